"""The followers of an attempt, each a Ray actor beside its driver: what they need is in that node's environment."""

import os
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from services.contract import AttemptSpec, Message, Report
from services.training.node import local_actor
from services.training.reports.integrations.following import Follower, Open
from services.training.reports.integrations.mlflow import MlflowSink
from services.training.reports.integrations.sink import Status
from services.training.reports.integrations.tensorboard import TensorboardSink
from services.training.reports.integrations.wandb import WandbSink

CLOSE_SECONDS = 120.0  # longer than a sink may take to open: a short job ends before it has
PAUSE_SECONDS = 5.0  # what is missing then, the next attempt tells
GRACE_SECONDS = 5.0  # beyond it, an actor that does not answer is left to itself
ENVIRONMENT = {  # where the node does not say otherwise
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it may hold a password
    "WANDB_ERROR_REPORTING": "false",
    # A follower tries again by itself; MLflow alone would try for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def sinks(spec: AttemptSpec) -> list[tuple[str, Open]]:
    """What the job asked for, each with its name in messages."""
    found: list[tuple[str, Open]] = []
    for number, integration in enumerate(spec.integrations.wandb):
        run_id = f"{spec.job_id}-{number}" if number else spec.job_id
        found.append(("Weights & Biases", partial(WandbSink, integration.wandb, run_id)))
    if spec.integrations.mlflow:
        found.append(("MLflow", partial(MlflowSink, spec.integrations.mlflow)))
    if spec.integrations.tensorboard:
        found.append(("TensorBoard", TensorboardSink))
    return found


def start(spec: AttemptSpec, reporter: Any) -> list[Any]:
    """Waits for none of them."""
    environment = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    actor = local_actor(Follower, runtime_env={"env_vars": environment})

    def report(report: Report) -> None:
        ray.get(reporter.report.remote(report))  # so that what a follower told before it closed comes before the end

    return [actor.remote(name, sink, spec, report) for name, sink in sinks(spec)]


def close(followers: list[Any], status: Status | None, reporter: Any) -> None:
    """Before the attempt's last report, after which nothing may be told. None: another attempt will go on."""
    if not followers:
        return
    ray.get(reporter.flush.remote())
    seconds = CLOSE_SECONDS if status else PAUSE_SECONDS
    for closing in [follower.close.remote(status, seconds) for follower in followers]:
        try:
            ray.get(closing, timeout=seconds + GRACE_SECONDS)
        except RayError as error:
            sentence = f"An integration died, and lacks the last steps: {str(error).splitlines()[0]:.200}"
            reporter.report.remote(Message(level="warn", message=sentence))

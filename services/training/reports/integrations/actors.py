"""Starts and closes the followers of an attempt (one run of a job): Ray actors that send the job's metrics to W&B,
MLflow and TensorBoard.

Followers run on the node of the driver (the job's main program), because the driver's environment has the addresses and
keys of these services.
"""

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

CLOSE_SECONDS = 120.0  # longer than opening a sink may take: a short job may end before its sink is open
PAUSE_SECONDS = 5.0  # for an attempt that is paused; the next attempt writes the missing steps
GRACE_SECONDS = 5.0  # time after which an actor that does not answer is given up
ENVIRONMENT = {  # defaults of variables that the node does not set
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the URL may hold a password
    "WANDB_ERROR_REPORTING": "false",
    # A follower retries by itself; MLflow would retry for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def sinks(spec: AttemptSpec) -> list[tuple[str, Open]]:
    """Returns the services that receive the job's metrics (W&B, MLflow or TensorBoard), as pairs: the name of the
    service in messages, and a function that opens a run in the service."""
    named: list[tuple[str, Open]] = []
    for number, integration in enumerate(spec.integrations.wandb):
        run_id = f"{spec.job_id}-{number}" if number else spec.job_id
        named.append(("Weights & Biases", partial(WandbSink, integration.wandb, run_id)))
    if spec.integrations.mlflow:
        named.append(("MLflow", partial(MlflowSink, spec.integrations.mlflow)))
    if spec.integrations.tensorboard:
        named.append(("TensorBoard", TensorboardSink))
    return named


def start(spec: AttemptSpec, reporter: Any) -> list[Any]:
    """Starts a follower (an actor that sends metrics) for each service to which the job's metrics go, such as MLflow.
    `reporter` is the actor through which a follower tells the user about errors.

    Returns the actors' handles immediately, before they have started.
    """
    environment = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    actor = local_actor(Follower, runtime_env={"env_vars": environment})

    def report(report: Report) -> None:
        ray.get(reporter.report.remote(report))  # waits, so that the report comes before the attempt's last report

    return [actor.remote(name, sink, spec, report) for name, sink in sinks(spec)]


def close(followers: list[Any], status: Status | None, reporter: Any) -> None:
    """Waits until the followers (actors that send metrics) have sent all steps, and closes them.

    The function must be called before the last report of the attempt (one run of the job). `status` is how the job
    ended; it is None if another attempt will resume the job. If a follower has died, the user is told through
    `reporter`.
    """
    if not followers:
        return
    ray.get(reporter.flush.remote())
    seconds = CLOSE_SECONDS if status else PAUSE_SECONDS
    for closing in [follower.close.remote(status, seconds) for follower in followers]:
        try:
            ray.get(closing, timeout=seconds + GRACE_SECONDS)
        except RayError as error:
            what = "The process that sends metrics to an integration died; the integration lacks the last steps"
            sentence = f"{what}: {str(error).splitlines()[0]:.200}"
            reporter.report.remote(Message(level="warn", message=sentence))

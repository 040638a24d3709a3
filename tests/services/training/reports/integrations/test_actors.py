"""Tests which services a job's metrics are sent to, and the actors that send them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.contract import AttemptSpec, Integrations, Mlflow, Wandb, WandbIntegration
from services.training.reports.integrations.actors import sinks
from services.training.reports.integrations.mlflow import MlflowSink
from services.training.reports.integrations.tensorboard import TensorboardSink
from services.training.reports.integrations.wandb import WandbSink

PROGRAM = """
import json, sys, time
import ray
from services.contract import AttemptSpec
from services.training.reports.integrations import actors

class Reporter:
    def __init__(self):
        self.told = []

    def report(self, report):
        self.told.append(report.message)

    def flush(self):
        pass

    def all(self):
        return self.told

ray.init(address="auto", logging_level="ERROR")
reporter = ray.remote(num_cpus=0)(Reporter).remote()
spec = AttemptSpec.model_validate_json(sys.argv[1])
followers = actors.start(spec, reporter)
actors.close(followers, "succeeded", reporter)
first = ray.get(reporter.all.remote())
followers = actors.start(spec, reporter)
ray.get(followers[0].__ray_ready__.remote())
ray.kill(followers[0])
actors.close(followers, "succeeded", reporter)
print(json.dumps([first, ray.get(reporter.all.remote())[len(first):]]))
"""


def test_each_service_that_the_job_names_is_a_sink_and_several_runs_have_ids_of_their_own(
    make_spec: Callable[..., AttemptSpec],
) -> None:
    wandb = tuple(WandbIntegration(type="wandb", wandb=Wandb(project=name)) for name in "ab")
    every = Integrations(wandb=wandb, mlflow=Mlflow(experiment="e"), tensorboard=True)
    named = sinks(make_spec(integrations=every))
    assert [name for name, _ in named] == ["Weights & Biases", "Weights & Biases", "MLflow", "TensorBoard"]
    first, second, mlflow, tensorboard = (sink for _, sink in named)
    assert (first.func, first.args) == (WandbSink, (Wandb(project="a"), "ftjob-1"))  # type: ignore[attr-defined]
    assert second.args == (Wandb(project="b"), "ftjob-1-1")  # type: ignore[attr-defined]
    assert (mlflow.func, mlflow.args) == (MlflowSink, (Mlflow(experiment="e"),))  # type: ignore[attr-defined]
    assert tensorboard is TensorboardSink
    assert sinks(make_spec()) == []


@pytest.mark.ray
def test_followers_are_closed_with_the_attempt_and_one_that_died_is_told(
    make_spec: Callable[..., AttemptSpec], ray_environment: dict[str, str]
) -> None:
    spec = make_spec(integrations=Integrations(tensorboard=True)).model_dump_json()
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, spec]
    folder = Path(__file__).parents[5]
    done = subprocess.run(command, env=ray_environment, cwd=folder, stdout=subprocess.PIPE, check=True, timeout=300)
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert [message.split(":")[0] for message in first] == ["TensorBoard"]
    assert "The process that sends metrics to an integration died" in second[-1]

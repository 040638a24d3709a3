"""Tests the MLflow sink with a real tracking server, and with a database file."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from services import storage
from services.contract import AttemptSpec, Mlflow
from services.training.reports.integrations.following import Follower
from services.training.reports.integrations.mlflow import MlflowSink
from tests.services.training.spool import STARTED_AT, Spool

# Of MLflow's own tables.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

OPTIONS = Mlflow(experiment="préférences / dpo", run_name="first")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder)]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 400
        while not answers(port):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def follow(spec: AttemptSpec, status: Any) -> list[str]:
    told: list[Any] = []
    Follower("MLflow", partial(MlflowSink, OPTIONS), spec, told.append).close(status, 60)
    return [report.message for report in told]


def the_run(client: MlflowClient) -> Any:
    experiment = client.get_experiment_by_name(OPTIONS.experiment)
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def history(client: MlflowClient, run: Any, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key))


@pytest.mark.slow
def test_a_resumed_run_is_one_run_on_the_server_with_each_step_once(
    spec: AttemptSpec,
    spool: Spool,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.replace("//", "//user:canary@"))
    client = MlflowClient(server)
    spool.add_steps(1, 5)
    (message,) = follow(spec.model_copy(update={"attempt": 1}), None)
    run = the_run(client)
    assert run.info.status == "RUNNING"
    assert message == f"MLflow: {server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    spool.add_steps(4, 9, attempt=2)
    follow(spec, "succeeded")
    run = the_run(client)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert history(client, run, "train/loss") == [(n, 1 / n) for n in range(1, 10)]
    assert history(client, run, "eval/loss") == [(n, 2 / n) for n in (3, 6, 9)]
    assert client.get_metric_history(run.info.run_id, "train/loss")[0].timestamp == (STARTED_AT + 1) * 1000
    assert run.data.params["optim.schedule"] == "linear"
    assert run.data.tags["raydpo.job"] == "ftjob-1"
    assert run.data.tags["raydpo.fine_tuned_model"] == "ft:tiny:raydpo::12345678"
    assert "canary" not in "".join(capfd.readouterr())


@pytest.mark.slow
def test_without_a_server_the_run_is_in_a_database_file_that_the_next_attempt_continues(
    spec: AttemptSpec, spool: Spool, tmp_path: Path
) -> None:
    spool.add_steps(1, 5)
    follow(spec.model_copy(update={"attempt": 1}), None)
    spool.add_steps(4, 9, attempt=2)
    (message,) = follow(spec, "failed")
    assert message.startswith(
        "MLflow: the cluster has no MLflow tracking server (MLFLOW_TRACKING_URI is not set), so the run is written"
    )
    assert "runs/ftjob-1/mlflow/mlflow.db" in message
    client = MlflowClient(f"sqlite:///{storage.fetch(storage.join(spec.run_uri, 'mlflow', 'mlflow.db'))}")
    run = the_run(client)
    assert run.info.status == "FAILED"
    assert history(client, run, "train/loss") == [(n, 1 / n) for n in range(1, 10)]


@pytest.mark.slow
def test_more_steps_than_a_batch_may_hold_are_written_in_parts(spec: AttemptSpec, spool: Spool) -> None:
    spool.add_steps(1, 600, attempt=2)
    follow(spec, None)
    client = MlflowClient(f"sqlite:///{storage.fetch(storage.join(spec.run_uri, 'mlflow', 'mlflow.db'))}")
    assert [step for step, _ in history(client, the_run(client), "train/rewards/margins")] == list(range(1, 601))


def test_a_server_that_is_away_is_told_of_once(
    spec: AttemptSpec, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    spool.add_steps(1, 3, attempt=2)
    (message,) = follow(spec, "succeeded")
    assert "127.0.0.1" in message
    assert message.endswith("The training itself continues.")

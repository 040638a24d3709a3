"""Tests the W&B sink: offline files are read back record by record, and servers answer or cannot be reached."""

import json
import os
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from services import storage
from services.contract import AttemptSpec, Wandb
from services.training.reports.integrations.following import Follower
from services.training.reports.integrations.wandb import WandbSink
from tests.services.training.spool import STARTED_AT, Spool
from tests.services.training.wandb_server import WandbServer
from tests.services.web import running

OPTIONS = Wandb(project="my project", name="first", entity="team", tags=("a", "b"))


@pytest.fixture(autouse=True)
def no_service_is_left() -> Iterator[None]:
    """Stops W&B's background process after each test. Programs of later tests would otherwise find it by the
    environment."""
    yield
    wandb.teardown()
    assert "WANDB_SERVICE" not in os.environ


def follow(spec: AttemptSpec, status: Any, seconds: float = 60) -> list[str]:
    told: list[Any] = []
    Follower("W&B", partial(WandbSink, OPTIONS, spec.job_id), spec, told.append).close(status, seconds)
    return [report.message for report in told]


def records(file: Path) -> Iterator[Any]:
    """Yields the records of a `.wandb` file.

    The file is a LevelDB log: records in blocks of 32 KiB, after a header of 7 bytes.
    """
    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, part = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def history(file: Path) -> list[dict[str, Any]]:
    rows = [record.history for record in records(file) if record.WhichOneof("record_type") == "history"]
    return [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in rows]


def written(spec: AttemptSpec) -> Path:
    (folder,) = storage.list_uris(storage.join(spec.run_uri, "wandb"))
    assert folder.endswith("/offline-run-ftjob-1")
    (file,) = storage.list_uris(folder)
    return Path(storage.fetch(file))


def test_without_a_key_the_run_is_written_and_a_message_says_how_to_send_it(spec: AttemptSpec, spool: Spool) -> None:
    spool.add_steps(1, 9, attempt=2)
    (message,) = follow(spec, "succeeded")
    assert message == (
        "W&B: the cluster does not send to Weights & Biases (WANDB_API_KEY is not set), so the run is written to "
        "runs/ftjob-1/wandb/offline-run-ftjob-1 in the service's storage; "
        "send it later with `wandb sync offline-run-ftjob-1` and a key"
    )
    rows = history(written(spec))
    assert [row["_step"] for row in rows] == list(range(1, 10))
    assert rows[2] | {"train/loss": 1 / 3, "eval/loss": 2 / 3, "_timestamp": STARTED_AT + 3} == rows[2]
    found = list(records(written(spec)))
    (run,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.entity, run.display_name) == ("ftjob-1", "my project", "team", "first")
    assert sorted(run.tags) == ["a", "b", "raydpo", "raydpo/dpo", "raydpo/ftjob-1"]
    config = {
        update.key: update.value_json for record in found for update in [*record.config.update, *run.config.update]
    }
    assert json.loads(config["optim"])["schedule"] == "linear"
    assert config["fine_tuned_model"] == '"ft:tiny:raydpo::12345678"'
    summary = {update.key: update.value_json for record in found for update in record.summary.update}
    assert summary["status"] == '"succeeded"'
    assert found[-1].exit.exit_code == 0


def test_a_resumed_run_is_written_whole_under_the_same_id(spec: AttemptSpec, spool: Spool) -> None:
    spool.add_steps(1, 5)
    follow(spec.model_copy(update={"attempt": 1}), None)
    assert [row["_step"] for row in history(written(spec))] == [1, 2, 3, 4, 5]
    spool.add_steps(4, 9, attempt=2)
    follow(spec, "failed")
    assert [row["_step"] for row in history(written(spec))] == list(range(1, 10))
    assert list(records(written(spec)))[-1].exit.exit_code == 1


def test_the_operator_may_keep_a_cluster_with_a_key_offline(
    spec: AttemptSpec, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary" * 8)
    monkeypatch.setenv("WANDB_MODE", "offline")
    spool.add_steps(1, 2, attempt=2)
    (message,) = follow(spec, "succeeded")
    assert "(WANDB_MODE is not online)" in message
    assert b"canary" not in written(spec).read_bytes()


def test_a_resumed_run_is_one_run_on_the_server_with_each_step_once(
    spec: AttemptSpec, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(WandbServer()) as server:
        monkeypatch.setenv("WANDB_API_KEY", "canary" * 8)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        spool.add_steps(1, 5)
        assert follow(spec.model_copy(update={"attempt": 1}), None) == [
            f"W&B: {server.url}/team/my%20project/runs/ftjob-1"
        ]
        assert [row["_step"] for row in server.history] == [1, 2, 3, 4, 5]
        assert (server.summary["status"], server.exit_code) == ("interrupted", 1)
        spool.add_steps(4, 9, attempt=2)
        follow(spec, "succeeded")
    assert [row["_step"] for row in server.history] == list(range(1, 10))
    assert [row["train/loss"] for row in server.history] == [1 / n for n in range(1, 10)]
    assert (server.run["project"], server.run["entity"], server.run["displayName"]) == ("my project", "team", "first")
    assert (server.summary["status"], server.exit_code) == ("succeeded", 0)
    assert not storage.exists(storage.join(spec.run_uri, "wandb"))


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_told_of_once_and_without_the_key(
    spec: AttemptSpec, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.training.reports.integrations.wandb.INIT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", "canary" * 8)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    spool.add_steps(1, 2, attempt=2)
    (message,) = follow(spec, "succeeded")
    assert "http://127.0.0.1:9" in message
    assert "canary" not in message
    assert not storage.exists(storage.join(spec.run_uri, "wandb"))

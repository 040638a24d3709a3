"""Tests the JSON of jobs, events and checkpoints."""

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from services.control_plane.core.tables import Checkpoint, Event, Job
from services.control_plane.jobs import jobs
from services.control_plane.jobs.requests import CreateJob
from services.control_plane.jobs.responses import checkpoint_object, event_object, job_object
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings

AT = datetime(2026, 1, 2, tzinfo=UTC)
SECONDS = 1_767_312_000
BODY: dict[str, Any] = {"model": "tiny", "training_file": "file-1", "seed": 5, "method": {"type": "dpo"}}


def job(**body: Any) -> Job:
    """Returns the row of a job that this request body asks for."""
    model = NamedModel("tiny", "/models/tiny", "tiny", AT)
    row = jobs.draft(CreateJob.model_validate(BODY | body).spec(), model, model)
    row.id, row.created_at = "ftjob-1", AT
    return row


def progress(stage: str, done: int) -> dict[str, Any]:
    """Returns the progress of a stage that took ten seconds for `done` of 40 and told so just now."""
    now = time.time()
    return {"stage": stage, "done": done, "total": 40, "since": now - 10, "at": now}


def test_options_that_are_left_to_training_are_auto_until_it_has_decided(offline: Settings) -> None:
    row = job()
    assert job_object(row, offline)["hyperparameters"] == dict.fromkeys(
        ("n_epochs", "batch_size", "learning_rate_multiplier"), "auto"
    )
    row.training = {"config": row.spec["config"] | {"n_epochs": 3, "batch_size": 8}}
    told = job_object(row, offline)
    assert told["hyperparameters"] == {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": "auto"}
    assert told["method"]["dpo"]["hyperparameters"].items() >= {"n_epochs": 3, "batch_size": 8, "beta": 0.1}.items()


def test_the_request_that_would_create_the_job_again_has_its_seed_and_its_choices(offline: Settings) -> None:
    dpo = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2}}}
    request = job_object(job(method=dpo, suffix="nice", metadata={"a": "b"}), offline)["x_raydpo"]["request"]
    assert (request["seed"], request["suffix"], request["metadata"]) == (5, "nice", {"a": "b"})
    assert request["method"]["dpo"]["hyperparameters"].items() >= {"beta": 0.2, "n_epochs": 2}.items()
    assert None not in request.values()
    assert "dataset" not in request["x_raydpo"]
    uri = "hf://datasets/a/b/c.jsonl"
    at_uri = job_object(job(training_file=uri, x_raydpo={"dataset": uri, "invalid_rows": "drop"}), offline)
    assert at_uri["x_raydpo"]["request"]["x_raydpo"].items() >= {"dataset": uri, "invalid_rows": "drop"}.items()


def test_the_end_is_estimated_from_the_speed_of_training_alone(offline: Settings) -> None:
    row = job()
    row.observed, row.progress = "running", progress("training", 10)
    told = job_object(row, offline)
    assert told["x_raydpo"]["progress"]["eta_seconds"] == pytest.approx(30, abs=5)
    assert told["estimated_finish"] == pytest.approx(time.time() + 30, abs=5)
    row.progress = progress("encoding", 10)
    told = job_object(row, offline)
    assert told["x_raydpo"]["progress"]["eta_seconds"] == pytest.approx(30, abs=5)
    assert told["estimated_finish"] is None
    row.progress = progress("training", 0)
    assert job_object(row, offline)["x_raydpo"]["progress"]["eta_seconds"] is None
    row.observed = "paused"
    assert job_object(row, offline)["x_raydpo"]["progress"] is None


def test_a_job_of_the_oldest_release_lacks_what_came_later(offline: Settings) -> None:
    row = job()
    later = ("integrations", "weights", "validation_file", "keep_checkpoints", "policy", "reference_source")
    row.spec = {name: value for name, value in row.spec.items() if name not in later}
    told = job_object(row, offline)
    assert (told["integrations"], told["validation_file"]) == ([], None)
    own = told["x_raydpo"]
    assert (own["adapter"], own["keep_checkpoints"], own["policy"]) == ("none", "all", "last")
    assert own["reference"] == {"source": "auto", "model": "tiny"}


def test_a_job_of_another_release_is_shown_as_it_is_stored(offline: Settings) -> None:
    row = job()
    row.spec |= {
        "weights": {"adapter": {"r": 3000, "kind": "new"}, "precision": "float4", "quantization": "int2"},
        "integrations": {"wandb": [{"type": "new", "wandb": {"project": "a", "name": None}}], "mlflow": {"new": 1}},
        "invalid_rows": {"how": "repair"},
    }
    told = job_object(row, offline)
    assert told["integrations"] == [{"type": "new", "wandb": {"project": "a"}}]
    extension = told["x_raydpo"]
    assert extension["adapter"].items() >= {"type": "lora", "r": 3000, "alpha": 64, "kind": "new"}.items()
    assert (extension["precision"], extension["quantization"]) == ("float4", "int2")
    assert (extension["mlflow"], extension["invalid_rows"]) == ({"new": 1}, "repair")


def test_events_and_checkpoints_have_their_public_ids(offline: Settings) -> None:
    event = Event(
        id=7, public_id="ftevent-1", created_at=AT, level="warn", message="m", type="metrics", data={"step": 1}
    )
    assert event_object(event) == {
        "id": "ftevent-1",
        "object": "fine_tuning.job.event",
        "created_at": SECONDS,
        "level": "warn",
        "message": "m",
        "type": "metrics",
        "data": {"step": 1},
    }
    row = Checkpoint(id="ftckpt-1", job_id="ftjob-1", created_at=AT, step=4, model_id="ft:tiny", metrics={"loss": 0.5})
    told = checkpoint_object(row)
    assert (told["id"], told["fine_tuned_model_checkpoint"], told["step_number"]) == ("ftckpt-1", "ft:tiny", 4)
    assert told["metrics"] == {"step": 4, "train_loss": 0.5}

"""Tests that the JSON of jobs and their parts is what the OpenAPI document describes."""

from dpo_core.methods import METHODS, described
from services.control_plane.core.tables import Checkpoint, Event
from services.control_plane.jobs.documents import (
    CheckpointDocument,
    DraftDocument,
    EventDocument,
    JobDocument,
    MethodDocument,
)
from services.control_plane.jobs.responses import checkpoint_object, event_object, job_object
from services.control_plane.settings import Settings
from tests.services.control_plane.documented import check
from tests.services.control_plane.jobs.test_responses import AT, job, progress


def test_a_job_is_as_described_in_each_of_its_states(offline: Settings) -> None:
    row = job()
    check(JobDocument, job_object(row, offline))
    row.observed, row.progress = "running", progress("training", 3)
    check(JobDocument, job_object(row, offline))
    row.progress = progress("training", 3) | {"encoding": {"done": 1, "total": 2}}
    check(JobDocument, job_object(row, offline))
    row.observed, row.finished_at, row.error = "failed", AT, {"code": "c", "message": "m", "param": None}
    check(JobDocument, job_object(row, offline))
    row.observed, row.error, row.fine_tuned_model, row.result_file = "succeeded", None, "ft:tiny", "file-2"
    check(JobDocument, job_object(row, offline))


def test_a_job_with_every_option_is_as_described(offline: Settings) -> None:
    extension = {"tensorboard": True, "mlflow": {"experiment": "e"}, "validation_share": 0.2, "adapter": {"r": 4}}
    wandb = {"type": "wandb", "wandb": {"project": "p"}}
    row = job(x_raydpo=extension | {"early_stop": {"patience": 2}}, integrations=[wandb], metadata={"a": "b"})
    check(JobDocument, job_object(row, offline))


def test_a_draft_is_a_job_without_an_id(offline: Settings) -> None:
    row = job()
    row.id = row.created_at = None  # type: ignore[assignment]
    check(DraftDocument, job_object(row, offline))


def test_events_checkpoints_and_methods_are_as_described() -> None:
    for data in (None, {"step": 1, "loss": 0.5}):
        event = Event(public_id="ftevent-1", created_at=AT, level="info", message="m", type="message", data=data)
        check(EventDocument, event_object(event))
    row = Checkpoint(id="ftckpt-1", job_id="ftjob-1", created_at=AT, step=4, model_id="ft:tiny", metrics={"loss": 0.5})
    check(CheckpointDocument, checkpoint_object(row))
    for kind in METHODS:
        check(MethodDocument, described(kind))

"""Provides sweeps whose jobs end as a test says, with stand-ins for Ray and for the served models."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dpo_core.config import TrainConfig
from services import storage
from services.contract import CheckpointSaved, EventBatch, JobEvent, Report, Started, Succeeded
from services.control_plane.settings import Settings
from services.control_plane.sweeps import runner
from services.spool import segment_uri, write
from tests.services.control_plane.conftest import FakeRay, pairs
from tests.services.control_plane.evaluations.conftest import (  # noqa: F401  # fixtures
    calm,
    engines,
    policy,
    until,
)
from tests.services.control_plane.evaluations.conftest import settings as settings_of_evaluations  # noqa: F401

BETA = "method.dpo.hyperparameters.beta"
ROWS = [{"prompt": [{"role": "user", "content": f"Question {number}"}]} for number in range(3)]
SCORE = {"kind": "score", "judge": {"type": "length"}, "rows": ROWS}
DRIFT = {"kind": "drift", "rows": ROWS}


@pytest.fixture(scope="module")
def settings(settings_of_evaluations: Settings) -> Iterator[Settings]:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "TICK_SECONDS", 0.05)
        yield settings_of_evaluations.model_copy(update={"max_running_jobs": 8})


@pytest.fixture(scope="module")
def file_id(api: httpx.Client) -> str:
    answer = api.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"})
    return str(answer.json()["id"])


@pytest.fixture(autouse=True)
def no_sweep_is_left(api: httpx.Client) -> Iterator[None]:
    """Cancels the sweeps that a test has left running, because their jobs would take the places of later ones."""
    yield
    for sweep in api.get("/x/sweeps", params={"status": "running"}).json()["data"]:
        api.post(f"/x/sweeps/{sweep['id']}/cancel")


def body(file_id: str, **more: Any) -> dict[str, Any]:
    """Returns the body of a sweep over three values of beta."""
    job = {"model": "tiny", "training_file": file_id, "method": {"type": "dpo"}, "x_raydpo": {"validation_share": 0.2}}
    return {"job": job, "parameters": {BETA: {"values": [0.05, 0.1, 0.2]}}, **more}


def created(api: httpx.Client, **sweep: Any) -> dict[str, Any]:
    answer = api.post("/x/sweeps", json=sweep)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def look(api: httpx.Client, sweep_id: str) -> dict[str, Any]:
    return dict(api.get(f"/x/sweeps/{sweep_id}").json())


def trials(api: httpx.Client, sweep_id: str) -> list[dict[str, Any]]:
    return list(api.get(f"/x/sweeps/{sweep_id}/trials", params={"limit": 100}).json()["data"])


def begun(api: httpx.Client, sweep_id: str, number: int) -> dict[str, Any]:
    """Waits until the trial has begun, and returns it."""
    until(lambda: len(trials(api, sweep_id)) > number)
    return trials(api, sweep_id)[number]


def ended(api: httpx.Client, sweep_id: str) -> dict[str, Any]:
    """Waits until the sweep has ended, and returns it."""
    until(lambda: look(api, sweep_id)["status"] != "running")
    return look(api, sweep_id)


def train(
    settings: Settings, ray: FakeRay, job_id: str, losses: list[float], *, succeeds: bool = True, **more: float
) -> None:
    """Reports that the job has trained, with an `eval/loss` at each of its steps, as its driver would.

    If `succeeds` is false, it goes on training then. `more` are other metrics of validation at the last step, by the
    ends of their names.
    """
    until(lambda: f"{job_id}-1" in ray.jobs)
    run = storage.join(settings.storage_url, "runs", job_id)
    last = {f"eval/{name.replace('_', '/')}": value for name, value in more.items()}
    saved: list[Report] = [
        CheckpointSaved(
            step=step,
            uri=storage.join(run, "checkpoints", f"step-{step}"),
            metrics={"eval/loss": loss} | (last if step == len(losses) else {}),
        )
        for step, loss in enumerate(losses, 1)
    ]
    started = Started(config=TrainConfig().resolved(12), num_groups=12, total_steps=len(losses))
    model_uri = storage.join(run, "checkpoints", f"step-{len(losses)}", "model")
    told = [started, *saved, *([Succeeded(model_uri=model_uri, trained_tokens=7)] if succeeds else [])]
    events = [JobEvent(seq=seq, created_at=time.time(), report=report) for seq, report in enumerate(told)]
    write(segment_uri(run, 1, 0), EventBatch(events=events).model_dump_json().encode())
    if succeeds:
        ray.jobs[f"{job_id}-1"] = "SUCCEEDED"

"""Provides rounds with a stand-in for the served models, and with jobs whose training is made up."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from services.control_plane.rounds import runner
from services.control_plane.settings import Settings
from tests.services.control_plane.attempts.test_reconciler import reports, spool
from tests.services.control_plane.conftest import FakeRay
from tests.services.control_plane.evaluations.conftest import (  # noqa: F401  # fixtures
    POLICY,
    Engines,
    calm,
    chats,
    engines,
    policy,
    settings,
    until,
    upload,
)

ENDS = ("succeeded", "failed", "cancelled")
ROUNDS: dict[str, Any] = {
    "model": POLICY,
    "rows": chats(12),
    "num_rounds": 2,
    "num_samples": 3,
    "judge": {"type": "length"},
    "evaluation": {"rows": chats(3)},
}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "LOOK_SECONDS", 0.05)
        yield


@pytest.fixture
def train(settings: Settings, fake_ray: FakeRay) -> Callable[..., None]:  # noqa: F811
    """Returns a function that lets a job's training succeed at once."""

    def succeed(job_id: str, attempt: int = 1) -> None:
        until(lambda: f"{job_id}-{attempt}" in fake_ray.jobs)
        spool(settings, job_id, attempt, reports(settings, job_id))
        fake_ray.jobs[f"{job_id}-{attempt}"] = "SUCCEEDED"

    return succeed


def created(api: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = api.post("/x/rounds", json=ROUNDS | body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def look(api: httpx.Client, rounds_id: str) -> dict[str, Any]:
    return dict(api.get(f"/x/rounds/{rounds_id}").json())


def reached(api: httpx.Client, rounds_id: str, number: int, name: str, *, seconds: float = 300) -> Any:
    """Waits until the round with this number has `name`, such as `job`, and returns that."""
    deadline = time.monotonic() + seconds
    while True:
        found = look(api, rounds_id)
        entry = found["rounds"][number] if len(found["rounds"]) > number else {}
        if entry.get(name):
            return entry[name]
        assert found["status"] not in ENDS, found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def ended(api: httpx.Client, rounds_id: str, *, seconds: float = 300) -> dict[str, Any]:
    """Waits until the rounds have ended, and returns them."""
    deadline = time.monotonic() + seconds
    while (found := look(api, rounds_id))["status"] not in ENDS:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found

"""Provides jobs that ask for evaluations, with stand-ins for Ray and for the served models."""

import json
from typing import Any

import httpx
import pytest

from tests.services.control_plane.evaluations.conftest import (  # noqa: F401  # fixtures
    calm,
    chats,
    engines,
    policy,
    settings,
    until,
)
from tests.services.control_plane.sweeps.conftest import file_id, train  # noqa: F401  # fixtures

WORDS: dict[str, Any] = {"kind": "score", "judge": {"type": "length"}}


def send(api: httpx.Client, name: str, content: bytes) -> str:
    answer = api.post("/files", files={"file": (name, content)}, data={"purpose": "fine-tune"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@pytest.fixture
def prompts(api: httpx.Client) -> str:
    """Returns the id of a file with three prompts, which a test may delete."""
    answer = {"role": "assistant", "content": "Yes."}
    rows = [{"messages": [*row["prompt"], answer]} for row in chats(3)]
    return send(api, "prompts.jsonl", "\n".join(map(json.dumps, rows)).encode())


def body(training_file: str, **extension: Any) -> dict[str, Any]:
    return {"model": "tiny", "training_file": training_file, "method": {"type": "dpo"}, "x_raydpo": extension}


def created(api: httpx.Client, training_file: str, **extension: Any) -> str:
    """Creates a job with these fields of x_raydpo, and returns its id."""
    answer = api.post("/fine_tuning/jobs", json=body(training_file, **extension))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def look(api: httpx.Client, job_id: str) -> dict[str, Any]:
    return dict(api.get(f"/fine_tuning/jobs/{job_id}").json())


def shown(api: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    return list(look(api, job_id)["x_raydpo"]["evaluations"])


def all_ended(api: httpx.Client, job_id: str, count: int) -> list[dict[str, Any]]:
    """Waits until `count` evaluations of the job have ended, and returns them in order of their models and names."""

    def ended() -> bool:
        found = shown(api, job_id)
        return len(found) == count and all(each["status"] in ("succeeded", "failed", "cancelled") for each in found)

    until(ended)
    return sorted(shown(api, job_id), key=lambda each: (each["model"], each["name"]))


def events(api: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    """Returns the events of the job, oldest first."""
    return list(reversed(api.get(f"/fine_tuning/jobs/{job_id}/events", params={"limit": 100}).json()["data"]))


def messages(api: httpx.Client, job_id: str) -> list[str]:
    return [event["message"] for event in events(api, job_id)]

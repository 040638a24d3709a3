"""Tests the route to which attempts report."""

from typing import Any

import httpx
import openai

from services.contract import Progress
from services.control_plane.settings import Settings
from tests.services.control_plane.attempts import test_reconciler as reconciler_tests
from tests.services.control_plane.attempts.test_reconciler import reports, spool, ticks
from tests.services.control_plane.conftest import FakeRay

settings, ray, job_id = reconciler_tests.settings, reconciler_tests.ray, reconciler_tests.job_id  # fixtures


def test_reports_are_recorded_once_in_order_and_only_from_the_open_attempt(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str, base_url: str
) -> None:
    ticks(settings, 1)
    token = ray.submissions[0]["runtime_env"]["env_vars"]["RAYDPO_ATTEMPT_TOKEN"]
    url = f"{base_url}/internal/attempts/{job_id}/1/events"
    batch = spool(settings, job_id, 1, reports(settings, job_id)[:-1]).model_dump(mode="json")

    def post(body: dict[str, Any], key: str = token) -> int:
        return httpx.post(url, json=body, headers={"Authorization": f"Bearer {key}"}).status_code

    assert post({"events": batch["events"][2:]}) == 400  # a gap
    assert [post(batch), post(batch)] == [200, 200]
    assert post(batch, "another") == 409
    steps = [e.data for e in client.fine_tuning.jobs.list_events(job_id, limit=100) if e.type == "metrics"]
    assert [data["step"] for data in steps] == [3, 2, 1]
    assert steps[0]["train_loss"] == 0.5
    assert steps[0]["train_reward_margin"] == 1.0

    ray.jobs[f"{job_id}-1"] = "FAILED"
    ticks(settings, 2)  # the attempt is lost, a second one launched
    assert post(batch) == 409
    # A resumed attempt computes some steps again: they are told once.
    spool(settings, job_id, 2, reports(settings, job_id))
    ray.jobs[f"{job_id}-2"] = "SUCCEEDED"
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"
    events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
    assert sum(event.type == "metrics" for event in events) == 3


def test_encoding_that_goes_on_stands_beside_training_in_the_progress(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str, base_url: str
) -> None:
    ticks(settings, 1)
    token = ray.submissions[0]["runtime_env"]["env_vars"]["RAYDPO_ATTEMPT_TOKEN"]
    started, first, second, *_ = reports(settings, job_id)
    told = [Progress(stage="encoding", done=done, total=24) for done in (8, 9, 16, 24)]
    waiting = Progress(stage="waiting for workers", done=0, total=0)
    shown = []
    for seq, report in enumerate([told[0], waiting, started, told[1], first, told[2], second, told[3]]):
        body = spool(settings, job_id, 1, [report], first=seq).model_dump(mode="json")
        url = f"{base_url}/internal/attempts/{job_id}/1/events"
        assert httpx.post(url, json=body, headers={"Authorization": f"Bearer {token}"}).status_code == 200
        progress = (client.fine_tuning.jobs.retrieve(job_id).model_extra or {})["x_raydpo"]["progress"]
        shown.append((progress["stage"], progress["done"], progress["encoding"]))
    assert shown == [
        ("encoding", 8, None),
        ("waiting for workers", 0, None),
        ("waiting for workers", 0, None),
        ("waiting for workers", 0, {"done": 9, "total": 24}),
        ("training", 1, {"done": 9, "total": 24}),
        ("training", 1, {"done": 16, "total": 24}),
        ("training", 2, {"done": 16, "total": 24}),
        ("training", 2, None),
    ]
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)

"""Tests what a launched attempt is told, and that doing a thing twice is harmless."""

import asyncio
from datetime import timedelta
from typing import Any

import openai
import pytest
from sqlalchemy import func, update

from services import storage
from services.contract import (
    Integrations,
    Mlflow,
    Wandb,
    WandbIntegration,
)
from services.control_plane.cleanup import stop_orphans
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Attempt
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from services.spool import segment_uri
from tests.services.control_plane.attempts import test_reconciler as reconciler_tests
from tests.services.control_plane.attempts.test_reconciler import flip, reports, spec_of, spool, submit, ticks
from tests.services.control_plane.conftest import FakeRay

settings, ray, job_id = reconciler_tests.settings, reconciler_tests.ray, reconciler_tests.job_id  # fixtures


def test_an_attempt_is_told_the_uri_and_what_it_must_keep_to(
    client: openai.OpenAI, settings: Settings, ray: FakeRay
) -> None:
    uri = "s3://bucket/rows/a.jsonl"
    body: Any = {"x_raydpo": {"dataset": uri}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uri, method={"type": "dpo"}, extra_body=body)
    ticks(settings, 1)
    spec = spec_of(ray.submissions[0])
    assert (spec.training_uri, spec.dataset_uris) == (uri, tuple(settings.dataset_uris))
    client.fine_tuning.jobs.cancel(job.id)
    ticks(settings, 3)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"


def test_an_attempt_is_told_where_the_job_is_followed_and_what_its_policy_will_be_called(
    client: openai.OpenAI, settings: Settings, ray: FakeRay
) -> None:
    body: Any = {
        "x_raydpo": {"dataset": "s3://bucket/rows/a.jsonl", "mlflow": {"experiment": "e"}, "tensorboard": True}
    }
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file="s3://bucket/rows/a.jsonl",
        method={"type": "dpo"},
        suffix="nice",
        integrations=[{"type": "wandb", "wandb": {"project": "p"}}],
        extra_body=body,
    )
    ticks(settings, 1)
    spec = spec_of(ray.submissions[0])
    wandb = WandbIntegration(type="wandb", wandb=Wandb(project="p"))
    assert spec.integrations == Integrations(wandb=(wandb,), mlflow=Mlflow(experiment="e"), tensorboard=True)
    assert (spec.fine_tuned_model or "").startswith("ft:tiny:raydpo:nice:")
    client.fine_tuning.jobs.cancel(job.id)
    ticks(settings, 3)


def test_a_lost_answer_to_the_launch_launches_nothing_twice(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ray.lose_answers = True
    ticks(settings, 4)
    assert len(ray.submissions) == 1
    assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "cancelled"


def test_what_ray_fails_to_stop_keeps_nothing_else_running(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = sorted(submit(client, settings) for _ in range(2))
    for each in jobs:
        ticks(settings, 1)
        client.fine_tuning.jobs.cancel(each)
        ticks(settings, 3)
    ray.jobs |= {f"{each}-1": "RUNNING" for each in jobs}
    stuck, stop = f"{jobs[0]}-1", ray.post
    monkeypatch.setattr(ray, "post", lambda path, body: (500, "stuck") if stuck in path else stop(path, body))

    async def sweep() -> list[str]:
        store = Store(settings.database_url)
        ray_api = RayApi(settings, store.instance)
        async with store.begin() as session:
            await session.execute(update(Attempt).values(ended_at=func.now() - timedelta(hours=1)))
        stopped = await stop_orphans(store, ray_api)
        await ray_api.close()
        await store.close()
        return stopped

    assert asyncio.run(sweep()) == [f"{jobs[1]}-1"]
    assert ray.jobs == {stuck: "RUNNING", f"{jobs[1]}-1": "STOPPED"}


def test_an_outcome_whose_bits_flipped_is_told_by_another_attempt(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    spool(settings, job_id, 1, reports(settings, job_id))
    flip(settings, job_id, 1, 0)
    ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    told = [event.message for event in client.fine_tuning.jobs.list_events(job_id) if event.level == "warn"][::-1]
    uri = segment_uri(storage.join(settings.storage_url, "runs", job_id), 1, 0)
    assert told == [
        "The last reports of attempt 1 are lost, so events or metrics are missing: "
        f"the file {uri} is damaged: it does not match its sha256",
        "Attempt 1 of the job ended: its process ended before it was finished; the next attempt begins 5 s later",
    ]
    spool(settings, job_id, 2, reports(settings, job_id))
    ray.jobs[f"{job_id}-2"] = "SUCCEEDED"
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"

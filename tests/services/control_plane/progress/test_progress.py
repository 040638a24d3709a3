"""Tests what a job shows about its progress, and when it will end."""

import asyncio
import time
from typing import Any

import openai
import pytest

from services.contract import JobEvent, Progress, Report, StepMetrics
from services.control_plane.attempts import attempts
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Attempt, Job
from services.control_plane.jobs import jobs
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pairs


@pytest.fixture
def job_id(client: openai.OpenAI) -> str:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"}).id


def attempt(settings: Settings, job_id: str, number: int, reports: dict[float, Report], *, lost: bool = False) -> None:
    """Adds an attempt with reports, each by how many seconds ago it was sent. If `lost` is true, the attempt has
    died."""
    events = [
        JobEvent(seq=seq, created_at=time.time() - ago, report=report)
        for seq, (ago, report) in enumerate(reports.items())
    ]

    async def run() -> None:
        store = Store(settings.database_url)
        async with store.begin() as session:
            job = await session.get_one(Job, job_id)
            opened = await attempts.begin(session, job_id, number, None, num_accelerators=0)
            if job.observed == "queued":
                await jobs.move(session, job, "running", actor="test", event="It starts")
        async with store.begin() as session:
            await attempts.record(session, job_id, number, events, settings, posted=True)
        if lost:
            async with store.begin() as session:
                await attempts.end(session, await session.get_one(Attempt, (job_id, opened.number)), "it died")
        await store.close()

    asyncio.run(run())


def seen(client: openai.OpenAI, job_id: str) -> tuple[dict[str, Any] | None, int | None]:
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job.x_raydpo["progress"], job.estimated_finish  # type: ignore[attr-defined]


def step(number: int) -> StepMetrics:
    return StepMetrics(step=number, total_steps=100, metrics={"loss": 0.5})


def test_a_queued_job_has_no_progress(client: openai.OpenAI, job_id: str) -> None:
    assert seen(client, job_id) == (None, None)


def test_encoding_tells_its_own_end_and_not_the_jobs(client: openai.OpenAI, settings: Settings, job_id: str) -> None:
    encoding = {
        20.0: Progress(stage="encoding", done=0, total=100),
        10.0: Progress(stage="encoding", done=50, total=100),
    }
    attempt(settings, job_id, 1, encoding)
    progress, finish = seen(client, job_id)
    assert progress is not None
    assert (progress["stage"], progress["done"], progress["total"]) == ("encoding", 50, 100)
    assert progress["eta_seconds"] == pytest.approx(0, abs=3)  # 10 s were left 10 s ago
    assert finish is None


def test_training_tells_the_jobs_end_at_its_rate_so_far(client: openai.OpenAI, settings: Settings, job_id: str) -> None:
    attempt(settings, job_id, 1, {40.0: step(10), 0.0: step(30)})
    progress, finish = seen(client, job_id)
    assert progress is not None
    assert finish is not None
    assert progress["eta_seconds"] == pytest.approx(140, abs=5)  # two seconds a step
    assert finish == pytest.approx(time.time() + 140, abs=5)


def test_a_lost_attempt_leaves_no_progress_and_its_successor_counts_from_its_own_start(
    client: openai.OpenAI, settings: Settings, job_id: str
) -> None:
    attempt(settings, job_id, 1, {5000.0: step(1), 4000.0: step(20)}, lost=True)
    assert seen(client, job_id) == (None, None)
    attempt(settings, job_id, 2, {10.0: step(20), 0.0: step(30)})  # from the checkpoint at step 19
    progress, _ = seen(client, job_id)
    assert progress is not None
    assert progress["eta_seconds"] == pytest.approx(70, abs=5)  # a second a step, whatever the first attempt took

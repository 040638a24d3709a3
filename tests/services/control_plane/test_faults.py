"""Tests the reconciler with a crash before and after every commit and every request to Ray, each followed by a
restart."""

import asyncio
import gc
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO
from typing import Any

import pytest
from sqlalchemy import event, func, select, update
from sqlalchemy.orm import Session

from services.contract import Deployment, Paused
from services.control_plane.attempts.reconciler import Reconciler
from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import DEFAULT_PROJECT, TERMINAL, Attempt, Job, Lease
from services.control_plane.files import files
from services.control_plane.jobs import jobs
from services.control_plane.jobs.requests import CreateJob
from services.control_plane.models import models
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from tests.services.control_plane.attempts.test_reconciler import reports, spool
from tests.services.control_plane.conftest import FakeRay, pairs

MOST_TICKS = 20


class Crash(BaseException):
    """Raised in place of SIGKILL. No code handles it."""


class Faults:
    """Counts the points that are passed, and crashes at one of them."""

    def __init__(self, at: int) -> None:
        self.left = at

    def pass_point(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Crash


@contextmanager
def faults(at: int) -> Iterator[Faults]:
    found = Faults(at)
    for name in ("before_commit", "after_commit"):
        event.listen(Session, name, found.pass_point)
    yield found
    for name in ("before_commit", "after_commit"):
        event.remove(Session, name, found.pass_point)


class FaultyLauncher(RayApi):
    """A client of Ray that crashes before and after each request that changes something."""

    def __init__(self, settings: Settings, store: Store, found: Faults) -> None:
        super().__init__(settings, store.instance)
        self._found = found

    async def submit(self, submission_id: str, spec_uri: str, token: str) -> None:
        self._found.pass_point()
        await super().submit(submission_id, spec_uri, token)
        self._found.pass_point()

    async def stop(self, submission_id: str) -> None:
        self._found.pass_point()
        await super().stop(submission_id)
        self._found.pass_point()

    async def serve(self, deployments: Sequence[Deployment]) -> None:
        self._found.pass_point()
        await super().serve(deployments)
        self._found.pass_point()


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay) -> Settings:
    migrate(offline.database_url)
    return offline.model_copy(update={"ray_url": f"http://127.0.0.1:{fake_ray.server.server_port}"})


async def new_job(store: Store, settings: Settings) -> str:
    stored = await files.store_file(BytesIO(pairs()), settings)
    async with store.begin_for(DEFAULT_PROJECT) as session:
        named = {"filename": "pairs.jsonl", "purpose": files.TRAINING, "project_id": DEFAULT_PROJECT}
        row = await files.add(session, stored, **named, report={"kind": "pairs", "num_rows": 12})
        body = CreateJob.model_validate({"model": "tiny", "training_file": row.id, "method": {"type": "dpo"}})
        model = await models.find(session, settings, "tiny")
        return (await jobs.submit(session, body.spec(), model, None, "key", settings)).id


def live(ray: FakeRay, job_id: str) -> list[str]:
    return [name for name, status in ray.jobs.items() if name.startswith(job_id) and status == "RUNNING"]


async def play(settings: Settings, ray: FakeRay, job_id: str, story: str, store: Store) -> None:
    """Plays what happens outside of the service: attempts end, and users cancel, pause and resume the job, as the story
    says."""
    async with store.begin() as session:
        job = await session.get_one(Job, job_id)
        if job.observed == "paused":
            await jobs.resume(session, job_id, "key")
    for name in live(ray, job_id):
        number = int(name.rsplit("-", 1)[1])
        if story == "cancelled":
            if job.desired == "run":
                async with store.begin() as session:
                    await jobs.cancel(session, job_id, "key")
        elif story == "paused" and number == 1:
            if job.desired == "run":
                async with store.begin() as session:
                    await jobs.pause(session, job_id, "key")
            else:
                spool(settings, job_id, number, [*reports(settings, job_id)[:2], Paused(step=1)])
                ray.jobs[name] = "FAILED"  # Ray's word for a status that is not 0
        elif story == "dies once" and number == 1:
            ray.jobs[name] = "FAILED"
        else:
            spool(settings, job_id, number, reports(settings, job_id))
            ray.jobs[name] = "SUCCEEDED"


async def run_to_the_end(settings: Settings, ray: FakeRay, story: str, at: int, store: Store) -> bool:
    """Runs a job to its end with a crash at one point. Returns whether the point was reached."""
    job_id = await new_job(store, settings)
    crashed = False
    for tick in range(MOST_TICKS):
        with faults(at if not crashed else 0) as found:
            ray_api = FaultyLauncher(settings, store, found)
            reconciler = Reconciler(store, ray_api, settings, holder=f"{job_id} {tick if crashed else 'first'}")
            try:
                await reconciler.tick()
            except Crash:
                crashed = True
            at = found.left
        await ray_api.close()
        async with store.begin() as session:
            # As time would.
            await session.execute(update(Lease).values(expires_at=func.now()))
            await session.execute(update(Attempt).values(ended_at=Attempt.ended_at - timedelta(hours=1)))
        assert len(live(ray, job_id)) <= 1
        await play(settings, ray, job_id, story, store)
        async with store.begin() as session:
            job = await session.get_one(Job, job_id)
            attempts = list(await session.scalars(select(Attempt).where(Attempt.job_id == job_id)))
            if job.observed in TERMINAL:
                break
    assert job.observed == ("cancelled" if story == "cancelled" else "succeeded")
    assert len(attempts) == (2 if story in ("dies once", "paused") else 1)
    assert all(attempt.state == "ended" for attempt in attempts)
    async with store.begin() as session:
        assert jobs.replay(await jobs.log_of(session, job_id)) == (job.desired, job.observed, job.version)
    assert not live(ray, job_id)
    return crashed


async def count_points(settings: Settings, ray: FakeRay, story: str) -> int:
    """Runs jobs with a crash at each point in turn, and returns the number of points.

    All use one store, which keeps the SQL of its statements.
    """
    store = Store(settings.database_url)
    for at in itertools.count(1):
        if not await run_to_the_end(settings, ray, story, at, store):
            break
    await store.close()
    return at


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a crash closes no connection
@pytest.mark.parametrize("story", ["succeeds", "dies once", "paused", "cancelled"])
def test_a_crash_at_any_point_loses_and_doubles_nothing(settings: Settings, fake_ray: FakeRay, story: str) -> None:
    fake_ray.resources = {"CPU": 8.0}
    at = asyncio.run(count_points(settings, fake_ray, story))
    assert at > 15  # the points of a life
    gc.collect()  # what crashes left open is complained of here

"""Tests how jobs, their reference models and the models of requests take turns on one GPU."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import select, text, update

from services.control_plane.attempts.reconciler import Reconciler
from services.control_plane.attempts.scheduling import (
    FOR_MODELS,
    FOR_MODELS_TURN,
    Misfit,
    needs,
    reference_model,
    what_each_waits_for,
)
from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import Attempt, Deployment, Job
from services.control_plane.models.deployments import deployments
from services.control_plane.models.deployments.eviction import Engines
from services.control_plane.models.models import NamedModel
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import FakeRay
from tests.services.control_plane.test_faults import new_job

CHAT = NamedModel("chat", "s3://bucket/chat", "chat", datetime(2026, 1, 1, tzinfo=UTC))


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay) -> Settings:
    migrate(offline.database_url)
    ray = {"ray_url": f"http://127.0.0.1:{fake_ray.server.server_port}"}
    gpus = {"num_gpus_per_worker": 1.0, "num_gpus_per_model": 1.0}
    return offline.model_copy(update=ray | gpus | {"model_wait_seconds": 60.0})


class World:
    """A reconciler, and what happens around it: requests for models, and the ends of jobs."""

    def __init__(self, store: Store, settings: Settings, ray: FakeRay) -> None:
        self._ray_api = RayApi(settings, store.instance)
        self._reconciler = Reconciler(store, self._ray_api, settings, holder="one")
        self.store, self._settings, self._ray = store, settings, ray

    async def tick(self, count: int = 1) -> tuple[set[str], int]:
        """Runs ticks of the reconciler. Returns the models that are served then, and how many attempts run."""
        for _ in range(count):
            self._ray_api._view = None  # as half a second would
            await self._reconciler.tick()
        served = {name.split("-", 2)[2].rsplit("-", 1)[0] for name in self._ray.applications}
        return served, list(self._ray.jobs.values()).count("RUNNING")

    async def submit(self) -> str:
        return await new_job(self.store, self._settings)

    async def waits_for(self, job_id: str) -> str | None:
        async with self.store.begin() as session:
            return (await session.get_one(Job, job_id)).waits_for

    async def end(self, job_id: str) -> None:
        """Cancels the job as a user does, and lets Ray stop it."""
        async with self.store.begin() as session:
            await session.execute(text("UPDATE jobs SET desired = 'cancel' WHERE id = :id"), {"id": job_id})
        for _ in range(3):
            await self.tick()

    async def want_reference(self, job_id: str, name: str | None) -> None:
        async with self.store.begin() as session:
            await session.execute(update(Attempt).where(Attempt.job_id == job_id).values(reference=name))

    async def ask(self) -> None:
        async with self.store.begin() as session:
            await deployments.use(session, CHAT)

    async def answer(self, *, ends: bool = True) -> bool:
        async with self.store.begin() as session:
            entered = await deployments.enter(session, CHAT.app_name, "here")
            if ends:
                await deployments.leave(session, {CHAT.app_name}, "here")
            return entered

    async def close(self) -> None:
        await self._reconciler.release()
        await self._ray_api.close()


@asynccontextmanager
async def _world(settings: Settings, ray: FakeRay) -> AsyncIterator[World]:
    store = Store(settings.database_url)
    world = World(store, settings, ray)
    async with store.begin() as session:
        await session.execute(text("DELETE FROM deployments"))
    ray.jobs.clear()
    ray.serve.clear()
    ray.resources = {"CPU": 8.0, "GPU": 1.0}
    try:
        yield world
    finally:
        await world.close()
        await store.close()


Story = Callable[[World], Coroutine[Any, Any, None]]


@pytest.fixture
def tell(settings: Settings, fake_ray: FakeRay) -> Callable[[Story], None]:
    async def run(story: Story) -> None:
        async with _world(settings, fake_ray) as world:
            await story(world)

    return lambda story: asyncio.run(run(story))


def test_an_idle_model_leaves_the_gpu_to_a_job_and_the_next_model_waits_for_its_end(
    tell: Callable[[Story], None],
) -> None:
    async def story(world: World) -> None:
        await world.ask()
        assert await world.tick(2) == ({"chat"}, 0)
        assert await world.answer()
        job_id = await world.submit()
        assert await world.tick() == (set(), 0)
        assert await world.waits_for(job_id) == FOR_MODELS
        assert await world.tick() == (set(), 1)
        await world.ask()
        assert await world.tick() == (set(), 1)
        async with world.store.begin() as session:
            told = await deployments.waits_for(session, CHAT.app_name)
        jobs = "jobs leave 0 GPUs to models, 0 loaded models use some of them"
        assert told == f"waits for GPUs: {jobs}, and this model needs 1"
        second = await world.submit()
        await world.end(job_id)
        assert await world.tick() == (set(), 1)  # it waits for longer than the model, which is next
        third = await world.submit()
        await world.end(second)
        assert await world.tick() == ({"chat"}, 0)
        assert await world.waits_for(third) == FOR_MODELS_TURN
        await world.end(third)

    tell(story)


def test_a_busy_model_keeps_the_gpu_for_its_turn_and_the_job_is_told(tell: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        await world.ask()
        await world.tick(2)
        assert await world.answer(ends=False)
        job_id = await world.submit()
        assert await world.tick(2) == ({"chat"}, 0)
        assert await world.waits_for(job_id) == FOR_MODELS
        async with world.store.begin() as session:
            await session.execute(update(Deployment).values(ready_at=text("now() - interval '1 hour'")))
        assert await world.tick() == ({"chat"}, 0)
        assert not await world.answer()  # its last request has ended, and it takes no new one
        assert await world.tick(2) == (set(), 1)
        await world.end(job_id)

    tell(story)


def test_a_reference_has_the_gpu_of_its_job_and_leaves_it_when_it_is_released(tell: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        job_id = await world.submit()
        assert await world.tick() == (set(), 1)
        async with world.store.begin() as session:
            await deployments.use(session, CHAT)
            row = await session.scalar(select(Attempt).where(Attempt.job_id == job_id))
            assert row is not None
        await world.want_reference(job_id, CHAT.app_name)
        assert await world.tick(2) == ({"chat"}, 1)
        await world.want_reference(job_id, None)
        assert await world.tick() == (set(), 1)
        await world.end(job_id)

    tell(story)


# --- the pure part -------------------------------------------------------------------------------------


def a_job(number: int, **values: Any) -> Job:
    spec = {"num_workers": 1, "model": f"m{number}", "training_file": "f", "config": {}} | values.pop("spec", {})
    given = {"project_id": "a", "priority": 0, "observed": "queued", "desired": "run", "model_source": f"/m{number}"}
    at = datetime(2026, 1, 1, 0, 0, number, tzinfo=UTC)
    return Job(id=f"job-{number}", created_at=at, spec=spec, model_root="m", **(given | values))


ONE_GPU, FOUR = {"CPU": 32.0, "GPU": 1.0}, {"CPU": 32.0, "GPU": 4.0}


def test_gpus_that_models_hold_are_not_free(settings: Settings) -> None:
    large = a_job(1, spec={"num_workers": 4})
    assert what_each_waits_for([large], {}, FOUR, settings) == {"job-1": None}
    assert what_each_waits_for([large], {}, FOUR, settings, engines=Engines(2.0)) == {"job-1": FOR_MODELS}
    turn = what_each_waits_for([large], {}, FOUR, settings, engines=Engines(go_first=True))
    assert turn == {"job-1": FOR_MODELS_TURN}
    cpus = settings.model_copy(update={"num_gpus_per_worker": 0.0, "num_gpus_per_model": 0.0})
    assert what_each_waits_for([large], {}, FOUR, cpus, engines=Engines(9.0, go_first=True)) == {"job-1": None}


def test_a_job_needs_gpus_for_its_reference_until_it_trains(settings: Settings) -> None:
    mixed = settings.model_copy(update={"num_gpus_per_worker": 0.5, "num_gpus_per_model": 2.0})
    assert needs(a_job(1), mixed)["GPU"] == 2.0
    assert needs(a_job(1, training={"total_steps": 1}), mixed)["GPU"] == 0.5
    assert needs(a_job(1, spec={"reference_source": "trainer"}), mixed)["GPU"] == 0.5


def test_a_job_whose_reference_has_no_place_waits_and_one_with_the_same_reference_does_not(settings: Settings) -> None:
    several = settings.model_copy(update={"max_running_jobs": 8})
    running = [a_job(1, observed="running"), a_job(2, observed="running")]
    same = a_job(3, spec={"model": "m1"}, model_source="/m1")
    waits = what_each_waits_for([*running, same, a_job(4)], {}, {"CPU": 32.0, "GPU": 8.0}, several)
    most = "as many models as may be loaded at once: 2 (setting max_loaded_models)"
    said = f"running jobs to end, because their reference models are {most}"
    assert waits == {"job-3": None, "job-4": said}


def test_a_pinned_model_leaves_one_place_less_to_references_unless_it_is_one_itself(settings: Settings) -> None:
    several, cluster = settings.model_copy(update={"max_running_jobs": 8}), {"CPU": 32.0, "GPU": 8.0}
    jobs = [a_job(1, observed="running"), a_job(2)]
    of_first, of_second = (reference.app_name for job in jobs if (reference := reference_model(job)))

    def waits(*pinned: str, jobs: list[Job] = jobs) -> str | None:
        return what_each_waits_for(jobs, {}, cluster, several, engines=Engines(pinned=frozenset(pinned)))["job-2"]

    assert waits() is None
    most = "as many models as may be loaded at once: 2 (setting max_loaded_models)"
    both = f"their reference models and pinned models are {most}"
    assert waits("other") == f"running jobs to end, because {both}"
    assert waits(of_first) is waits(of_second) is None
    assert waits("other", jobs=jobs[1:]) is None
    pinned = "2 models always stay loaded (pinned), and at most 2 may be loaded (setting max_loaded_models)"
    found = waits("other", "another")
    assert isinstance(found, Misfit)
    assert found == f"a place for its reference model, because {pinned}"
    assert found.remedy == "Ask the operator to pin fewer models, or to raise max_loaded_models."
    no_reference = a_job(2, spec={"reference_source": "trainer"})
    assert waits("other", "another", jobs=[jobs[0], no_reference]) is None

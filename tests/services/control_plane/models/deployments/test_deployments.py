"""Tests the rows of deployed models: who uses them, who waits, and that no used model is removed."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from sqlalchemy import text

from services import contract
from services.control_plane.core.store import Store, migrate
from services.control_plane.models.deployments import deployments
from services.control_plane.models.deployments import settings as deployment_settings
from services.control_plane.models.deployments.deployments import Reference
from services.control_plane.models.deployments.eviction import Room
from services.control_plane.models.models import NamedModel
from services.control_plane.ray_api import Application
from services.control_plane.settings import Settings

AT = datetime(2026, 1, 1, tzinfo=UTC)
A, B, C = (NamedModel(name, f"s3://bucket/{name}", name, AT) for name in "abc")
TWO = Room(places=2, wait_seconds=180)


class Cluster:
    """A stand-in for Ray Serve that does everything immediately, and the database beside it."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store, self.settings = store, settings
        self.loaded: dict[str, Application] = {}

    async def place(self, room: Room = TWO) -> set[str]:
        async with self.store.begin() as session:
            served = await deployments.place(session, self.settings, self.loaded, room)
        self.loaded = {row.app_name: self.loaded.get(row.app_name, Application("running", "")) for row in served}
        return {row.model_id for row in served}

    async def use(self, *models: NamedModel) -> None:
        for model in models:
            async with self.store.begin() as session:
                await deployments.use(session, model)

    async def enter(self, model: NamedModel, replica: str = "one") -> bool:
        async with self.store.begin() as session:
            return await deployments.enter(session, model.app_name, replica)

    async def leave(self, model: NamedModel, replica: str = "one") -> None:
        async with self.store.begin() as session:
            await deployments.leave(session, {model.app_name}, replica)

    async def waits_for(self, model: NamedModel) -> str | None:
        async with self.store.begin() as session:
            return await deployments.waits_for(session, model.app_name)

    async def sql(self, statement: str, **values: object) -> None:
        async with self.store.begin() as session:
            await session.execute(text(statement), values)

    async def pin(self, model: NamedModel, app_name: str | None = None) -> None:
        """Adds a running job whose attempt needs the model."""
        job_id = f"ftjob-{secrets.token_hex(8)}"
        job = "id, project_id, spec, model_source, model_root, priority, desired, observed, version"
        values = "'proj_default', '{}', '/m', 'm', 0, 'run', 'running', 1"
        await self.sql(f"INSERT INTO jobs ({job}) VALUES (:id, {values})", id=job_id)
        attempt = "job_id, number, state, token, next_seq, num_accelerators, failed, reference"
        values = ":id, 1, 'running', '', 0, 0, false, :reference"
        name = app_name or model.app_name
        await self.sql(f"INSERT INTO attempts ({attempt}) VALUES ({values})", id=job_id, reference=name)
        if app_name is None:
            await self.use(model)

    async def release(self, model: NamedModel) -> None:
        await self.sql("UPDATE attempts SET reference = NULL WHERE reference = :name", name=model.app_name)


@asynccontextmanager
async def _cluster(settings: Settings) -> AsyncIterator[Cluster]:
    store = Store(settings.database_url)
    cluster = Cluster(store, settings)
    await cluster.sql("DELETE FROM deployments")
    await cluster.sql("UPDATE attempts SET state = 'ended', ended_at = now() WHERE state <> 'ended'")
    try:
        yield cluster
    finally:
        await store.close()


Story = Callable[[Cluster], Awaitable[None]]


@pytest.fixture
def tell(offline: Settings) -> Callable[[Story], None]:
    migrate(offline.database_url)

    async def run(story: Story) -> None:
        async with _cluster(offline) as cluster:
            await story(cluster)

    return lambda story: asyncio.run(run(story))


def test_references_of_jobs_do_not_evict_one_another_and_are_not_forgotten(tell: Callable[[Story], None]) -> None:
    async def story(cluster: Cluster) -> None:
        for model in (A, B, C):
            await cluster.pin(model)
            await cluster.place()
        assert await cluster.place() == {"a", "b"}
        assert await cluster.waits_for(C) == (
            "waits for another model to be idle: 2 of at most 2 models are loaded, and all are loading or answering"
        )
        await cluster.sql("UPDATE deployments SET last_used_at = now() - interval '3 days'")
        await cluster.release(B)
        assert await cluster.place() == {"a", "c"}
        cluster.loaded = {}  # the cluster starts anew
        assert await cluster.place() == {"a", "c"}

    tell(story)


def test_a_model_that_is_served_in_another_precision_is_scored_by_an_engine_of_its_own(
    tell: Callable[[Story], None],
) -> None:
    async def story(cluster: Cluster) -> None:
        on_gpus = cluster.settings.model_copy(update={"num_gpus_per_model": 1.0})
        async with cluster.store.begin() as session:
            scorer = await deployments.reference(session, on_gpus, A)
            await deployments.use(session, A)
            await deployments.use(session, A, app_name=scorer.app_name, for_job=True)
        assert scorer == Reference(deployments.scorer_of(A), 1.0, A, None)
        await cluster.pin(A, scorer.app_name)
        async with cluster.store.begin() as session:
            placed = await deployments.place(session, on_gpus, {}, TWO)
        told = {row.app_name: (row.purpose, row.dtype, row.engine.prefix_caching) for row in placed}
        assert told == {A.app_name: ("answers", "bfloat16", True), scorer.app_name: ("scores", "float32", True)}
        cluster.loaded = {row.app_name: Application("running", "", row) for row in placed}
        await cluster.sql("UPDATE attempts SET reference = NULL")
        await cluster.sql("UPDATE deployments SET last_used_at = now() - interval '2 minutes', answered_at = now()")
        async with cluster.store.begin() as session:
            placed = await deployments.place(session, on_gpus, cluster.loaded, TWO)
        assert [row.app_name for row in placed] == [A.app_name]  # nothing is left to be scored

    tell(story)


@pytest.mark.parametrize("asks", ["a request", "an answer", "nobody"])
def test_an_engine_that_clients_use_too_stays_when_the_scores_are_in(tell: Callable[[Story], None], asks: str) -> None:
    async def story(cluster: Cluster) -> None:
        async with cluster.store.begin() as session:
            await deployments.use(session, A, for_job=True)
        await cluster.pin(A, A.app_name)
        for _ in range(2):
            assert await cluster.place() == {"a"}
        if asks == "a request":
            await cluster.use(A)
        elif asks == "an answer":  # a client does not wait for a model that is loaded
            assert await cluster.enter(A)
            await cluster.leave(A)
        async with cluster.store.begin() as session:
            await deployments.use(session, A, for_job=True)  # another attempt
        await cluster.release(A)
        assert await cluster.place() == {"a"}
        await cluster.sql("UPDATE deployments SET last_used_at = now() - interval '2 minutes'")
        assert await cluster.place() == (set() if asks == "nobody" else {"a"})

    tell(story)


def test_an_engine_that_scores_keeps_its_settings_until_the_scores_are_in(tell: Callable[[Story], None]) -> None:
    async def story(cluster: Cluster) -> None:
        async def placed() -> contract.Deployment:
            async with cluster.store.begin() as session:
                (found,) = await deployments.place(session, cluster.settings, cluster.loaded, TWO)
            return found

        async def choose(changes: dict[str, object] | None) -> None:
            async with cluster.store.begin() as session:
                await deployment_settings.choose(session, "a", changes)

        await cluster.pin(A)
        running = await placed()
        assert (running.dtype, running.purpose, running.engine.max_lora_rank) == ("float32", "both", 32)
        await choose({"dtype": "bfloat16", "max_lora_rank": 8, "replicas": 2})
        cluster.loaded = {A.app_name: Application("running", "", running)}
        assert await placed() == running
        cluster.loaded = {}  # Ray was started anew, and the attempt still waits for this engine
        again = await placed()
        assert (again.app_name, again.dtype, again.purpose) == (A.app_name, "float32", "scores")
        cluster.loaded = {A.app_name: Application("running", "", running)}
        await cluster.release(A)
        after = await placed()
        assert (after.dtype, after.purpose, after.engine.max_lora_rank) == ("bfloat16", "answers", 8)
        await choose(None)

    tell(story)


@pytest.mark.parametrize(
    ("changes", "purpose"),
    [({}, "both"), ({"dtype": "bfloat16"}, "answers"), ({"max_model_len": 64}, "answers"), ({"replicas": 2}, "both")],
)
def test_one_engine_does_both_where_it_can(
    tell: Callable[[Story], None], changes: dict[str, object], purpose: str
) -> None:
    async def story(cluster: Cluster) -> None:
        async with cluster.store.begin() as session:
            await deployment_settings.choose(session, "a", changes)
            await deployments.use(session, A)
            (placed,) = await deployments.place(session, cluster.settings, {}, TWO)
            scorer = await deployments.reference(session, cluster.settings, A)
            await deployment_settings.choose(session, "a", None)
        assert placed.purpose == purpose
        assert (scorer.app_name == A.app_name) == (purpose == "both")

    tell(story)


def test_a_model_is_in_use_while_any_control_plane_has_requests_of_it_and_lives(tell: Callable[[Story], None]) -> None:
    async def story(cluster: Cluster) -> None:
        one = Room(places=1, wait_seconds=180)
        await cluster.use(A)
        assert not await cluster.enter(A)  # it has no place yet
        await cluster.place(one)
        assert await cluster.enter(A)
        assert await cluster.enter(A, "two")
        await cluster.place(one)
        await cluster.use(B)
        await cluster.leave(A)
        assert await cluster.place(one) == {"a"}
        await cluster.leave(A, "two")
        assert await cluster.place(one) == {"b"}
        await cluster.enter(B)
        await cluster.use(C)
        assert await cluster.place(one) == {"b"}
        await cluster.sql("UPDATE deployments SET answering = '{\"one\": 1}'")  # it died long ago
        assert await cluster.place(one) == {"c"}

    tell(story)


def test_a_model_that_leaves_takes_no_new_requests_and_ends_the_others(tell: Callable[[Story], None]) -> None:
    async def story(cluster: Cluster) -> None:
        one = Room(places=1, wait_seconds=180)
        await cluster.use(A)
        await cluster.place(one)
        await cluster.place(one)
        assert await cluster.enter(A)
        await cluster.use(B)
        await cluster.sql("UPDATE deployments SET ready_at = now() - interval '1 hour' WHERE model_id = 'a'")
        assert await cluster.place(one) == {"a"}
        assert await cluster.waits_for(A) == "waits for its next turn, because another model waits"
        assert not await cluster.enter(A, "two")
        async with cluster.store.begin() as session:
            assert await deployments.stay(session, {A.app_name}, "one") == set()
        assert await cluster.place(one) == {"a"}
        await cluster.leave(A)
        assert await cluster.place(one) == {"b"}

    tell(story)


def test_one_that_is_used_in_the_moment_of_its_eviction_stays(tell: Callable[[Story], None]) -> None:
    async def story(cluster: Cluster) -> None:
        one = Room(places=1, wait_seconds=180)
        await cluster.use(A)
        await cluster.place(one)
        await cluster.enter(A)
        await cluster.leave(A)
        await cluster.use(B)
        async with cluster.store.begin() as session:
            assert await deployments.enter(session, A.app_name, "one")
            placing = asyncio.create_task(cluster.place(one))
            await _until_blocked(cluster)
        assert await placing == {"a"}
        assert await cluster.waits_for(A) is None

    tell(story)


async def _until_blocked(cluster: Cluster) -> None:
    """Waits until a transaction waits for a row that another one holds."""
    for _ in range(500):
        async with cluster.store.begin() as session:
            if await session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
                return
        await asyncio.sleep(0.02)
    raise AssertionError


def test_what_nobody_waits_for_is_not_loaded_again_after_the_cluster_was_lost(tell: Callable[[Story], None]) -> None:
    async def story(cluster: Cluster) -> None:
        await cluster.use(A, B)
        await cluster.place()
        await cluster.sql("UPDATE deployments SET last_used_at = now() - interval '1 hour' WHERE model_id = 'a'")
        cluster.loaded = {}
        assert await cluster.place() == {"b"}
        assert await cluster.waits_for(A) == "waits for its turn to be loaded"

    tell(story)


def test_a_model_that_the_release_before_loaded_keeps_its_place(tell: Callable[[Story], None]) -> None:
    async def story(cluster: Cluster) -> None:
        await cluster.use(A)
        cluster.loaded = {A.app_name: Application("running", "")}
        assert not await cluster.enter(A)  # a moment ago it may have been another one's turn
        await cluster.sql("UPDATE deployments SET asked_at = now() - interval '6 seconds'")
        assert await cluster.enter(A)
        assert await cluster.place() == {"a"}
        assert await cluster.waits_for(A) is None

    tell(story)


def test_who_waits_for_one_that_loads_is_told_since_when(tell: Callable[[Story], None]) -> None:
    async def story(cluster: Cluster) -> None:
        await cluster.use(A)
        await cluster.place()
        cluster.loaded = {A.app_name: Application("loading", "")}
        await cluster.place()
        await cluster.sql("UPDATE deployments SET placed_at = now() - interval '42.2 seconds'")
        assert await cluster.waits_for(A) == "has been loading for 42 seconds"
        cluster.loaded = {A.app_name: Application("running", "")}
        await cluster.place()
        assert await cluster.waits_for(A) is None

    tell(story)


def test_one_that_failed_is_forgotten_for_the_next_request_but_not_for_an_attempt(
    tell: Callable[[Story], None],
) -> None:
    async def story(cluster: Cluster) -> None:
        await cluster.use(A)
        await cluster.pin(B)
        for model in (A, B):
            async with cluster.store.begin() as session:
                await deployments.forget(session, model.app_name)
        assert await cluster.place() == {"b"}

    tell(story)


def test_the_status_tells_when_a_model_was_used_and_when_it_leaves(tell: Callable[[Story], None]) -> None:
    async def story(cluster: Cluster) -> None:
        settings = cluster.settings.model_copy(update={"model_idle_seconds": 600.0})

        async def times(model: NamedModel) -> tuple[datetime | None, datetime | None]:
            async with cluster.store.begin() as session:
                status = await deployments.status(session, settings, cluster.loaded, model)
            return status.last_used_at, status.unloads_at

        assert await times(A) == (None, None)
        await cluster.use(A)
        await cluster.place()
        await cluster.place()
        assert await cluster.enter(A)
        assert (await times(A))[1] is None  # it is answering
        await cluster.leave(A)
        used_at, unloads_at = await times(A)
        assert used_at is not None
        assert unloads_at is not None
        assert abs((unloads_at - used_at).total_seconds() - 600) < 1

    tell(story)

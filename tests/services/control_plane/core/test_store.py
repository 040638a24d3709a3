"""Tests which rows a project's session sees and changes, in whatever form the statement is written."""

import asyncio
import secrets
import time
from datetime import UTC, datetime

import psycopg
import pytest
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import aliased

from services.control_plane.core.errors import Unavailable
from services.control_plane.core.store import Store, live_jobs, migrate, refuses_value
from services.control_plane.core.tables import Model, Project
from services.control_plane.models.deployments import deployments
from services.control_plane.models.models import NamedModel
from services.control_plane.tenants import quotas

OWN, SHARED, FOREIGN = "ft:own", "ft:shared", "ft:foreign"


@pytest.fixture
def store(database_url: str) -> Store:
    """Returns a database with one model of `proj_b` and two of `proj_a`, one of which is shared with `proj_b`."""
    migrate(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute("INSERT INTO projects (id, name) VALUES ('proj_a', 'a'), ('proj_b', 'b')")
        job = "'ftjob-1', 'proj_a', '{}', '/m', 'm', 0, 'run', 'queued', 1"
        columns = "id, project_id, spec, model_source, model_root, priority, desired, observed, version"
        connection.execute(f"INSERT INTO jobs ({columns}) VALUES ({job})")
        for name, owner in ((OWN, "proj_b"), (SHARED, "proj_a"), (FOREIGN, "proj_a")):
            row = (name, owner, "/m", "m", "ftjob-1")
            connection.execute(
                "INSERT INTO models (id, project_id, source, root, job_id) VALUES (%s, %s, %s, %s, %s)", row
            )
        connection.execute(
            "INSERT INTO checkpoint_permissions (id, model_id, project_id) VALUES ('cp_1', %s, 'proj_b')", [SHARED]
        )
    return Store(database_url)


def test_a_project_whose_transactions_take_long_leaves_connections_to_others_and_to_the_service(
    database_url: str,
) -> None:
    migrate(database_url)
    wait, look = text("SELECT pg_sleep(:seconds)"), text("SELECT 1")

    async def run() -> float:
        store = Store(database_url, connections=10)

        async def write(project: str, seconds: float) -> None:
            async with store.begin_for(project) as session:
                await session.execute(wait, {"seconds": seconds})

        async def read(project: str) -> None:
            async with store.look_for(project) as session:
                await session.execute(look)

        async def act() -> None:
            async with store.begin() as session:
                await session.execute(look)

        await asyncio.gather(*(write("proj_a", 0) for _ in range(20)))  # connects
        many = [asyncio.create_task(write("proj_a", 3)) for _ in range(20)]
        more = [asyncio.create_task(write("proj_b", 3)) for _ in range(20)]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await asyncio.gather(read("proj_c"), write("proj_c", 0), act())
        took = time.monotonic() - began
        for task in (*many, *more):
            task.cancel()
        await asyncio.gather(*many, *more, return_exceptions=True)
        await store.close()
        return took

    assert asyncio.run(run()) < 2


def test_a_shared_model_is_read_and_only_an_own_one_changed(store: Store) -> None:
    async def run() -> None:
        other = aliased(Model)
        async with store.begin_for("proj_b") as session:
            for query in (select(Model.id), select(other.id), select(func.max(Model.id)).group_by(Model.id)):
                assert set(await session.scalars(query)) == {OWN, SHARED}
            assert await session.get(Model, FOREIGN) is None
            changed = update(Model).values(root="x").returning(Model.id)
            assert set(await session.scalars(changed)) == {OWN}
            assert set(await session.scalars(delete(Model).returning(Model.id))) == {OWN}
        with pytest.raises(AssertionError):
            async with store.begin_for("proj_b") as session:
                (await session.get_one(Model, SHARED)).root = "x"
        async with store.begin_for("proj_a") as session:
            assert set(await session.scalars(select(Model.id))) == {SHARED, FOREIGN}
            assert {model.root for model in await session.scalars(select(Model))} == {"m"}
        await store.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "refused"),
    [("a\0b", True), (secrets.token_hex(10_000), True), ("sound", False)],
    ids=["NUL", "too long for an index", "fine"],
)
def test_a_value_that_is_refused_is_told_from_a_database_that_is_away(
    database_url: str, name: str, refused: bool
) -> None:
    async def write(store: Store) -> bool:
        try:
            async with store.begin() as session:
                await session.execute(insert(Project).values(id=f"proj_{name[:9]}", name=name))
        except DBAPIError as error:
            return refuses_value(error)
        finally:
            await store.close()
        return False

    migrate(database_url)
    assert asyncio.run(write(Store(database_url))) is refused
    assert asyncio.run(write(Store("postgresql://nobody@127.0.0.1:1/none"))) is False


def test_no_model_is_served_under_the_name_of_another_ones_application(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of applications differ in 32 bits of a digest. Here two models have the same name."""
    monkeypatch.setattr(NamedModel, "app_name", "tiny-12345678")
    at = datetime.now(UTC)
    one, other = (NamedModel(f"ft:{name}", f"s3://b/{name}", "tiny", at) for name in ("one", "other"))

    migrate(database_url)
    store = Store(database_url)

    async def use(model: NamedModel) -> None:
        async with store.begin() as session:
            await deployments.use(session, model)

    async def use_both() -> None:
        await use(one)
        await use(one)
        with pytest.raises(Unavailable, match="'ft:other' cannot be loaded while another model uses its name"):
            await use(other)
        await store.close()

    asyncio.run(use_both())


def test_a_paused_job_is_no_work_and_the_last_days_workers_are_counted(database_url: str) -> None:
    migrate(database_url)
    columns = "id, project_id, spec, model_source, model_root, priority, desired, observed, version"
    attempt = "job_id, number, state, token, next_seq, num_accelerators, failed, created_at, ended_at"
    with psycopg.connect(database_url) as connection:
        connection.execute("INSERT INTO projects (id, name, weight) VALUES ('proj_w', 'w', 2)")
        for name, desired, observed in (("p", "pause", "paused"), ("r", "run", "running"), ("q", "run", "queued")):
            row = (f"ftjob-{name}", desired, observed)
            values = """%s, 'proj_w', '{"num_workers": 4}', '/m', 'm', 0, %s, %s, 1"""
            connection.execute(f"INSERT INTO jobs ({columns}) VALUES ({values})", row)
        for number, began, ended in ((1, 50, 40), (2, 26, 23), (3, 2, None)):  # hours ago
            since = "now() - make_interval(hours => %s)"
            values = f"'ftjob-r', %s, %s, '', 0, 0, false, {since}, {since}"
            state = "ended" if ended else "running"
            connection.execute(f"INSERT INTO attempts ({attempt}) VALUES ({values})", [number, state, began, ended])

    async def run() -> None:
        store = Store(database_url)
        async with store.begin() as session:
            assert {job.id for job in await live_jobs(session)} >= {"ftjob-r", "ftjob-q"}
            assert "ftjob-p" not in {job.id for job in await live_jobs(session)}
            share = (await quotas.shares(session))["proj_w"]
        assert (share.weight, round(share.worker_hours, 3)) == (2, 4 * (1 + 2))
        await store.close()

    asyncio.run(run())

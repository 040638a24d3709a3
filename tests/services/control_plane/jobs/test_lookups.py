"""Tests that requests for jobs at the same moment share a statement, and that none gets an outdated answer."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import SQLAlchemyError

from services.control_plane.core.errors import NotFound
from services.control_plane.core.store import Store, migrate
from services.control_plane.jobs.lookups import JobReader

JOB = "INSERT INTO jobs (id, project_id, spec, model_source, model_root, priority, desired, observed, version) VALUES "
OWNERS = {"ftjob-1": "proj_a", "ftjob-2": "proj_a", "ftjob-3": "proj_b"}


class Watched(JobReader):
    """Reads jobs, and records the statements. Their results are returned only when `go_on` is set."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.statements: list[set[str]] = []
        self.has_read, self.go_on = asyncio.Event(), asyncio.Event()

    async def _find(self, project_id: str, job_ids: list[str]) -> dict[str, Any]:
        self.statements.append(set(job_ids))
        found = await super()._find(project_id, job_ids)
        self.has_read.set()
        await self.go_on.wait()
        return found


@pytest.fixture(scope="module")
def database(database_url: str) -> str:
    migrate(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute("INSERT INTO projects (id, name) VALUES ('proj_a', 'a'), ('proj_b', 'b')")
        for job_id, owner in OWNERS.items():
            connection.execute(JOB + f"('{job_id}', '{owner}', '{{}}', '/m', 'm', 0, 'run', 'queued', 1)")
    return database_url


def run(database: str, story: Any) -> None:
    async def told() -> None:
        store = Store(database)
        try:
            await story(Watched(store))
        finally:
            await store.close()

    asyncio.run(told())


def task(asked: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(asked)


def test_who_asks_at_the_same_moment_shares_a_statement_of_his_project(database: str) -> None:
    async def story(reader: Watched) -> None:
        reader.go_on.set()
        asked = [reader.job("proj_a", name) for name in ("ftjob-1", "ftjob-2", "ftjob-1", "ftjob-3")]
        asked.append(reader.job("proj_b", "ftjob-3"))
        *found, foreign, own = await asyncio.gather(*asked, return_exceptions=True)
        assert [job.id for job, _ in (*found, own)] == ["ftjob-1", "ftjob-2", "ftjob-1", "ftjob-3"]
        assert isinstance(foreign, NotFound)
        assert reader.statements == [{"ftjob-1", "ftjob-2", "ftjob-3"}, {"ftjob-3"}]

    run(database, story)


def test_who_asks_while_a_statement_runs_sees_what_was_committed_before(database: str) -> None:
    async def story(reader: Watched) -> None:
        early = task(reader.job("proj_a", "ftjob-1"))
        await reader.has_read.wait()  # and not handed out
        with psycopg.connect(database) as connection:
            connection.execute("UPDATE jobs SET waits_for = 'a GPU' WHERE id = 'ftjob-1'")
        late = task(reader.job("proj_a", "ftjob-1"))
        await asyncio.sleep(0)
        reader.go_on.set()
        assert [(await asked)[0].waits_for for asked in (early, late)] == [None, "a GPU"]

    run(database, story)


def test_who_goes_away_leaves_the_others_their_answer(database: str) -> None:
    async def story(reader: Watched) -> None:
        gone, stays = (task(reader.job("proj_a", "ftjob-1")) for _ in range(2))
        await asyncio.sleep(0.05)
        gone.cancel()
        reader.go_on.set()
        assert (await stays)[0].id == "ftjob-1"
        assert gone.cancelled()

    run(database, story)


def test_a_database_that_fails_is_told_to_all_who_ask_and_asked_again_later(database: str) -> None:
    async def story(reader: Watched) -> None:
        reader.go_on.set()
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("ALTER TABLE jobs RENAME TO away")
            asked = (reader.job("proj_a", name) for name in ("ftjob-1", "ftjob-2"))
            failed = await asyncio.gather(*asked, return_exceptions=True)
            assert [isinstance(error, SQLAlchemyError) for error in failed] == [True, True]
            connection.execute("ALTER TABLE away RENAME TO jobs")
        assert (await reader.job("proj_a", "ftjob-1"))[0].id == "ftjob-1"

    run(database, story)

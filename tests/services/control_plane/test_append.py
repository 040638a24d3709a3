"""Rows that a transaction writes at its end, all by one statement."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import psycopg
import pytest
from sqlalchemy import event, select
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.store import Store, append, migrate
from services.control_plane.tables import DEFAULT_PROJECT, Answer, Event

JOB = "INSERT INTO jobs (id, project_id, spec, model_source, model_root, priority, desired, observed, version) VALUES"


@pytest.fixture
def job_id(database_url: str, request: pytest.FixtureRequest) -> str:
    migrate(database_url)
    job_id = f"ftjob-{request.node.name:.40}"
    with psycopg.connect(database_url) as connection:
        connection.execute(f"{JOB} (%s, %s, '{{}}', '/m', 'm', 0, 'run', 'queued', 1)", [job_id, DEFAULT_PROJECT])
    return job_id


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """What the database is sent, in order."""
    sent: list[str] = []

    def note(*given: object) -> None:
        sent.append(str(given[2]))

    event.listen(Engine, "before_cursor_execute", note)
    yield sent
    event.remove(Engine, "before_cursor_execute", note)


def in_one(database_url: str, work: Callable[[AsyncSession], Awaitable[None]]) -> None:
    """A transaction of the default project."""

    async def run() -> None:
        store = Store(database_url)
        try:
            async with store.begin_for(DEFAULT_PROJECT) as session:
                await work(session)
        finally:
            await store.close()

    asyncio.run(run())


def test_they_are_written_in_their_order_by_one_statement_at_the_end(
    database_url: str, job_id: str, statements: list[str]
) -> None:
    said = ["first", 'with "quotes", a \\ and a line\nbreak', "日本語 🚀", "last"]
    body = {"n": 0.1, "none": None, "list": [1, "2"]}

    async def write(session: AsyncSession) -> None:
        copy = append(session, Answer, request="r", content=job_id, retry_count=0, body=body)
        assert copy.project_id == DEFAULT_PROJECT
        for number, message in enumerate(said):
            told = {"public_id": f"{job_id}-{number}", "job_id": job_id, "message": message}
            append(session, Event, **told, data={"step": number} if number else None)
        assert statements == []

    async def read(session: AsyncSession) -> None:
        (kept,) = await session.scalars(select(Answer).where(Answer.content == job_id))
        assert (kept.project_id, kept.idempotency_key, kept.body) == (DEFAULT_PROJECT, None, body)
        rows = list(await session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.id)))
        assert [row.message for row in rows] == said
        assert [row.data for row in rows] == [None, {"step": 1}, {"step": 2}, {"step": 3}]
        assert {(row.level, row.type, row.attempt, row.seq) for row in rows} == {("info", "message", 0, None)}

    in_one(database_url, write)
    (statement,) = statements
    assert statement.count("INSERT INTO") == 2
    in_one(database_url, read)


def test_nothing_is_written_where_the_transaction_fails(database_url: str, job_id: str, statements: list[str]) -> None:
    async def fail(session: AsyncSession) -> None:
        append(session, Event, public_id=job_id, job_id=job_id, message="never")
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        in_one(database_url, fail)
    assert statements == []

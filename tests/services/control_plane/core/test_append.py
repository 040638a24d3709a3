"""Tests rows that a transaction writes at its end, all in one statement."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
from sqlalchemy import event, select
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.store import Store, append, migrate
from services.control_plane.core.tables import DEFAULT_PROJECT, Answer, Event, Job


def in_one(database_url: str, work: Callable[[AsyncSession], Awaitable[None]]) -> None:
    """Runs `work` in a transaction of the default project."""

    async def run() -> None:
        store = Store(database_url)
        try:
            async with store.begin_for(DEFAULT_PROJECT) as session:
                await work(session)
        finally:
            await store.close()

    asyncio.run(run())


@pytest.fixture
def job_id(database_url: str, request: pytest.FixtureRequest) -> str:
    migrate(database_url)
    job = Job(id=f"ftjob-{request.node.name:.40}", spec={}, model_source="/m", model_root="m")

    async def add(session: AsyncSession) -> None:
        session.add(job)

    in_one(database_url, add)
    return job.id


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Yields the list of all statements that the database gets, in order."""
    sent: list[str] = []

    def note(*given: object) -> None:
        sent.append(str(given[2]))

    event.listen(Engine, "before_cursor_execute", note)
    yield sent
    event.remove(Engine, "before_cursor_execute", note)


def test_they_are_written_in_their_order_by_one_statement_at_the_end(
    database_url: str, job_id: str, statements: list[str]
) -> None:
    said = ["first", 'with "quotes", a \\ and a line\nbreak', "日本語 🚀", "last"]
    body = {"n": 0.1, "none": None, "list": [1, "2"]}

    async def write(session: AsyncSession) -> None:
        answer = Answer(request="r", content=job_id, retry_count=0, body=body)
        append(session, answer)
        assert answer.project_id == DEFAULT_PROJECT
        for number, message in enumerate(said):
            told = Event(public_id=f"{job_id}-{number}", job_id=job_id, message=message)
            told.data = {"step": number} if number else None
            append(session, told)
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
        append(session, Event(public_id=job_id, job_id=job_id, message="never"))
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        in_one(database_url, fail)
    assert statements == []

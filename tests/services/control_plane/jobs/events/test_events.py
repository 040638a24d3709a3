"""Tests that a job's history reads the same, whether its steps are rows or in blocks."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.event import listen, remove
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.store import migrate
from services.control_plane.jobs.events import blocks, events
from services.control_plane.jobs.responses import event_object
from tests.services.control_plane.steps import end_job, insert_job, insert_message, insert_steps, pack_all, read


@pytest.fixture(autouse=True, scope="module")
def _migrated(database_url: str) -> None:
    migrate(database_url)


@pytest.fixture(scope="module")
def job_id(database_url: str, _migrated: None) -> str:
    """Writes a job of 2,500 steps with messages between them. Steps 701 to 709 came after all others."""
    job_id = insert_job(database_url, "ftjob-long")
    insert_message(database_url, job_id, "begins")
    for first in range(1, 2500, 500):
        insert_steps(database_url, job_id, (step for step in range(first, first + 500) if step not in range(701, 710)))
        insert_message(database_url, job_id, f"after {first}")
    insert_steps(database_url, job_id, range(701, 710))
    insert_message(database_url, job_id, "ends")
    insert_steps(database_url, insert_job(database_url, "ftjob-other"), range(1, 301))
    return job_id


async def pages(session: AsyncSession, job_id: str, limit: int, type: str | None) -> list[dict[str, Any]]:
    """Reads the list of events page by page, as a client does."""
    found: list[Any] = []
    while page := await events.page(
        session,
        job_id,
        before=await events.place_of(session, job_id, found[-1]["id"]) if found else None,
        type=type,
        limit=limit,
    ):
        found += map(event_object, page)
    return found


async def history(session: AsyncSession, job_id: str) -> dict[str, Any]:
    followed: list[Any] = []
    while more := await events.next_events(session, job_id, followed[-1].id if followed else 0, limit=333):
        followed += more
    newest = await events.newest_events(session, {job_id: 0, "ftjob-other": followed[-9].id}, limit=201)
    return {
        "pages": await pages(session, job_id, 700, None),
        "messages": await pages(session, job_id, 3, "message"),
        "metrics": await pages(session, job_id, 999, "metrics"),
        "followed": [event_object(event) for event in followed],
        "newest": [(event.job_id, event.id, event_object(event)) for event in newest],
        "some after": [event.id for event in await events.newest_events(session, {job_id: followed[-9].id}, limit=201)],
        "metric names": await events.metric_names(session, job_id),
        "steps": [step async for steps in events.metrics_of(session, job_id) for step in steps],
    }


def test_a_history_reads_the_same_while_the_job_runs_and_when_it_has_ended(database_url: str, job_id: str) -> None:
    async def look(session: AsyncSession) -> dict[str, Any]:
        return await history(session, job_id)

    as_rows = read(database_url, look)
    assert len(as_rows["pages"]) == len(as_rows["followed"]) == 2507
    assert as_rows["pages"] == as_rows["followed"][::-1]
    assert [step["step"] for step in as_rows["steps"]] == list(range(1, 2501))
    pack_all(database_url)
    assert read(database_url, look) == as_rows
    for job in (job_id, "ftjob-other"):
        end_job(database_url, job)
    pack_all(database_url)
    assert read(database_url, look) == as_rows


def test_blocks_are_decoded_off_the_event_loop(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = insert_job(database_url, "ftjob-decoded")
    insert_steps(database_url, job_id, range(1, 2101))
    pack_all(database_url)
    num_decoded, from_bytes = 0, blocks.from_bytes

    def decode(data: bytes) -> Any:
        nonlocal num_decoded
        num_decoded += 1
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return from_bytes(data)

    async def look(session: AsyncSession) -> None:
        place = await events.place_of(session, job_id, events.step_event_id(job_id, 3))
        assert len(await pages(session, job_id, 1000, None)) == 2100
        assert len(await events.next_events(session, job_id, place or 0, limit=5)) == 5
        assert [len(steps) async for steps in events.metrics_of(session, job_id)] == [1000, 1000, 100]

    monkeypatch.setattr(blocks, "from_bytes", decode)
    read(database_url, look)
    assert num_decoded >= 4


def test_an_unknown_id_has_no_place(database_url: str, job_id: str) -> None:
    strange = ["ftevent-0", "ftevent-xyz", "", events.step_event_id(job_id, 9999), events.step_event_id("ftjob-no", 5)]
    for public_id in [*strange, events.step_event_id(job_id, 5) + "0", events.step_event_id(job_id, 2**32 - 1)]:

        async def place(session: AsyncSession, public_id: str = public_id) -> int | None:
            return await events.place_of(session, job_id, public_id)

        assert read(database_url, place) is None


def test_blocks_that_add_nothing_to_a_list_are_not_read(database_url: str) -> None:
    job_id = insert_job(database_url, "ftjob-listed")
    insert_steps(database_url, job_id, range(1, 4001))
    pack_all(database_url)
    read_blocks = 0

    def count(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        nonlocal read_blocks
        read_blocks += cursor.rowcount if "step_blocks.parquet" in statement else 0

    async def look(session: AsyncSession) -> list[int]:
        found = []
        for before, type in ((None, None), (None, "metrics"), (events.step_event_id(job_id, 1500), None)):
            place = None if before is None else await events.place_of(session, job_id, before)
            nonlocal read_blocks
            read_blocks = 0
            steps = [
                event.data["step"] for event in await events.page(session, job_id, before=place, type=type, limit=9)
            ]
            found += [steps[0], read_blocks]
        read_blocks = 0
        steps = [event.data["step"] for event in await events.newest_events(session, {job_id: 0}, limit=9)]
        return [*found, steps[-1], read_blocks]

    listen(Engine, "after_cursor_execute", count)
    try:
        assert read(database_url, look) == [4000, 0, 4000, 0, 1499, 1, 4000, 0]
    finally:
        remove(Engine, "after_cursor_execute", count)


def test_a_step_of_an_unknown_number_of_steps_has_a_text() -> None:
    assert events.step_message({"step": 3, "train_loss": 0.5}) == "Step 3: training loss=0.5000"

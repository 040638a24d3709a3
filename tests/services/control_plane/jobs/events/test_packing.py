"""Tests which steps are packed into blocks, and that each is told once."""

import asyncio
import time

import anyio.to_thread
import psycopg
import pytest
from sqlalchemy import Engine, select
from sqlalchemy.event import listen, remove
from sqlalchemy.ext.asyncio import AsyncSession

from services.contract import JobEvent, StepMetrics
from services.control_plane.attempts import attempts
from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import StepBlock
from services.control_plane.jobs.events import blocks, packing
from services.control_plane.jobs.events.events import metrics_of
from services.control_plane.settings import Settings
from tests.services.control_plane.steps import counted, end_job, insert_job, insert_steps, pack_all, read


@pytest.fixture(autouse=True, scope="module")
def _migrated(database_url: str) -> None:
    migrate(database_url)


def test_the_newest_steps_of_a_running_job_stay_rows(database_url: str) -> None:
    job_id = insert_job(database_url, "ftjob-runs")
    insert_steps(database_url, job_id, range(1, 2000))
    pack_all(database_url)
    assert counted(database_url, job_id) == (1999, 0)
    insert_steps(database_url, job_id, range(2000, 3501))
    pack_all(database_url)
    assert counted(database_url, job_id) == (1500, 2)


def test_all_steps_of_an_ended_job_are_packed_and_it_is_not_looked_at_again(database_url: str) -> None:
    job_id = insert_job(database_url, "ftjob-ends")
    insert_steps(database_url, job_id, range(1, 1011))
    end_job(database_url, job_id)
    pack_all(database_url)
    assert counted(database_url, job_id) == (0, 2)
    with psycopg.connect(database_url) as connection:
        query = "SELECT steps_packed FROM jobs WHERE finished_at IS NOT NULL"
        assert set(connection.execute(query)) == {(True,)}


def test_a_step_that_a_later_attempt_repeats_is_told_once(database_url: str, offline: Settings) -> None:
    """The repeated steps are in a block. The block's gap, steps that were lost, is filled."""
    job_id = insert_job(database_url, "ftjob-repeats")
    insert_steps(database_url, job_id, (step for step in range(1, 3001) if step not in range(500, 503)))
    pack_all(database_url)
    again = [
        JobEvent(seq=seq, created_at=time.time(), report=StepMetrics(step=step, total_steps=9, metrics={"loss": -1.0}))
        for seq, step in enumerate(range(490, 510))
    ]

    async def report() -> None:
        store = Store(database_url)
        async with store.begin() as session:
            await attempts.begin(session, job_id, 2, None, num_accelerators=0)
            await attempts.record(session, job_id, 2, again, offline, posted=True)
        await store.close()

    asyncio.run(report())
    assert counted(database_url, job_id) == (2003, 1)
    for _ in range(2):
        steps = read(database_url, lambda session: _steps(session, job_id))
        assert [step["step"] for step in steps] == list(range(1, 3001))
        assert [step["step"] for step in steps if step["train_loss"] == -1.0] == [500, 501, 502]
        pack_all(database_url)
    assert counted(database_url, job_id) == (2000, 1)


def test_a_step_that_the_release_before_told_again_is_dropped(database_url: str) -> None:
    job_id = insert_job(database_url, "ftjob-twice")
    insert_steps(database_url, job_id, range(1, 3001))
    pack_all(database_url)
    insert_steps(database_url, job_id, range(7, 10), lambda step: {"train_loss": -1.0})
    pack_all(database_url)
    assert counted(database_url, job_id) == (2000, 1)
    assert all(step["train_loss"] > 0 for step in read(database_url, lambda session: _steps(session, job_id)))


def test_a_block_tells_which_steps_and_events_it_has(database_url: str) -> None:
    job_id = insert_job(database_url, "ftjob-sparse")
    insert_steps(database_url, job_id, [5, 6, 7, 100, 999, 2001])
    end_job(database_url, job_id)
    pack_all(database_url)

    async def first_block(session: AsyncSession) -> StepBlock:
        return (await session.scalars(select(StepBlock).where(StepBlock.job_id == job_id, StepBlock.number == 0))).one()

    block = read(database_url, first_block)
    assert [(each.lower, each.upper) for each in block.steps] == [(5, 8), (100, 101), (999, 1000)]
    numbers = blocks.from_bytes(block.parquet)["event_id"].to_pylist()
    assert (block.first_event, block.last_event) == (numbers[0], numbers[-1])
    assert block.metrics == [
        "full_valid_loss",
        "train_loss",
        "train_reward_accuracy",
        "train_reward_margin",
        "valid_loss",
    ]


def test_numbers_that_the_database_gives_back_as_integers_are_packed(database_url: str) -> None:
    """A number of 9.007e15 or more has no fraction, and JSONB writes it without a point."""
    job_id = insert_job(database_url, "ftjob-diverges")
    told = {1: 1e16, 2: 0.5, 3: 1e20, 4: -1e300, 5: 2.0}
    insert_steps(database_url, job_id, told, lambda step: {"train_loss": told[step]})
    end_job(database_url, job_id)
    pack_all(database_url)
    assert counted(database_url, job_id) == (0, 1)
    steps = read(database_url, lambda session: _steps(session, job_id))
    assert [step["train_loss"] for step in steps] == list(told.values())


def test_jobs_to_pack_are_found_by_indexes(database_url: str) -> None:
    """Most jobs have ended long ago, and are looked at no more."""
    plans = []

    def explain(_: object, __: object, statement: str, parameters: dict[str, object], *___: object) -> None:
        if "LATERAL" in statement:
            with psycopg.connect(database_url) as connection:
                connection.execute("SET enable_seqscan = off")  # which is quick for the few jobs of a test
                plan = connection.execute(f"EXPLAIN {statement}", parameters).fetchall()
                plans.append("\n".join(line for (line,) in plan))

    listen(Engine, "before_cursor_execute", explain)
    try:
        pack_all(database_url)
    finally:
        remove(Engine, "before_cursor_execute", explain)
    assert plans
    assert all("jobs_live" in plan and "jobs_to_pack" in plan for plan in plans), plans[0]


def test_a_locked_job_does_not_wait_for_threads_of_others(database_url: str) -> None:
    job_id = insert_job(database_url, "ftjob-locked")
    insert_steps(database_url, job_id, range(1, 9))
    end_job(database_url, job_id)

    async def pack() -> None:
        store, threads = Store(database_url), anyio.to_thread.current_default_thread_limiter()
        threads.total_tokens = 1
        await threads.acquire_on_behalf_of(store)  # no thread is free
        async with asyncio.timeout(300):
            await packing.pack(store, 1)
        await store.close()

    asyncio.run(pack())
    assert counted(database_url, job_id) == (0, 1)


def test_blocks_that_cannot_be_packed_stop_no_others_and_are_logged(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [insert_job(database_url, f"ftjob-broken-{number}") for number in range(3)]
    for job_id in broken:
        insert_steps(database_url, job_id, range(1, 9), lambda _: {"train_loss": 1.0, "strange": "no number"})  # type: ignore[dict-item]
        end_job(database_url, job_id)
    whole = insert_job(database_url, "ftjob-whole")
    insert_steps(database_url, whole, range(1, 9))
    end_job(database_url, whole)

    async def pack() -> None:
        store = Store(database_url)
        while counted(database_url, whole) != (0, 1):  # it is chosen at random
            await packing.pack(store, 1)
        assert await packing.pack(store, 10) == 0
        await store.close()

    asyncio.run(pack())
    assert all(f"block 0 of job {job_id} could not be packed" in caplog.text for job_id in broken)
    with psycopg.connect(database_url) as connection:
        connection.execute("DELETE FROM events WHERE job_id = ANY(%s)", [broken])


async def _steps(session: AsyncSession, job_id: str) -> list[dict[str, float]]:
    return [step async for steps in metrics_of(session, job_id) for step in steps]

"""Tests which steps are packed into blocks, and that each is told once."""

import asyncio
import time

import psycopg
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.contract import JobEvent, StepMetrics
from services.control_plane.attempts import attempts
from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import StepBlock
from services.control_plane.jobs.events import blocks
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
    numbers = blocks.from_bytes(block.rows)["event_id"].to_pylist()
    assert (block.first_event, block.last_event) == (numbers[0], numbers[-1])
    assert block.metrics == [
        "full_valid_loss",
        "train_loss",
        "train_reward_accuracy",
        "train_reward_margin",
        "valid_loss",
    ]


async def _steps(session: AsyncSession, job_id: str) -> list[dict[str, float]]:
    return [step async for steps in metrics_of(session, job_id) for step in steps]

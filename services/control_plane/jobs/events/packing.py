"""Moves metrics events from the rows of the table `events` into blocks. A block is a table with the metrics of up to
1,000 training steps of a job. It takes a tenth of the space of the rows."""

import logging
import random
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from sqlalchemy import delete, func, select, true, update
from sqlalchemy.dialects.postgresql import Range, insert
from sqlalchemy.dialects.postgresql.ranges import MultiRange
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.store import Store
from services.control_plane.core.tables import TERMINAL, Event, Job, StepBlock
from services.control_plane.jobs.events import blocks

log = logging.getLogger(__name__)

KEPT_BLOCKS = 2  # the newest blocks of a live job stay rows, because they still grow and are read most


async def pack(store: Store, most: int) -> int:
    """Packs at most `most` blocks, each of which holds the metrics of up to 1,000 training steps: full blocks of jobs
    that have not ended, and all steps of jobs that have ended. Returns how many blocks were packed.

    If a block cannot be packed, logs the error and goes on with the next block.
    """
    async with store.begin() as session:
        due = await _due(session, most)
    num_packed = 0
    for job_id, number in random.sample(due, min(most, len(due))):
        try:
            async with store.begin() as session:
                await pack_block(session, job_id, number)
            num_packed += 1
        except (SQLAlchemyError, OSError):  # the database is away
            raise
        except Exception:
            log.exception("The steps of block %d of job %s could not be packed, and stay rows", number, job_id)
    return num_packed


async def _due(session: AsyncSession, most: int) -> list[tuple[str, int]]:
    """Returns the blocks (tables with the metrics of many steps) to pack, as pairs of a job's id and a block's number
    in the job. Marks ended jobs that have nothing left to pack, so that later calls need not look at them.

    At most `most` ended jobs are looked at. Their order is random, so that jobs whose blocks cannot be packed do not
    stop the others.
    """
    steps = select(func.min(Event.step).label("first"), func.max(Event.step).label("last"))
    of_job = steps.where(Event.job_id == Job.id, Event.step.is_not(None)).lateral("steps")
    alive = select(Job.id).where(Job.observed.not_in(TERMINAL))
    ended = select(Job.id).where(Job.finished_at.is_not(None), ~Job.steps_packed).order_by(func.random()).limit(most)
    wanted = alive.union_all(ended).subquery("wanted")  # each of the two has an index; an OR would read all jobs
    query = select(Job.id, Job.finished_at, of_job.c.first, of_job.c.last).join(wanted, Job.id == wanted.c.id)
    due, done = list[tuple[str, int]](), list[str]()
    for job_id, finished_at, first, last in await session.execute(query.join(of_job, true())):
        if first is None:
            done += [job_id] if finished_at else []
            continue
        end = blocks.number_of(last) + (1 if finished_at else 1 - KEPT_BLOCKS)
        due += [(job_id, number) for number in range(blocks.number_of(first), end)]
    await session.execute(update(Job).where(Job.id.in_(done)).values(steps_packed=True))
    return due


async def pack_block(session: AsyncSession, job_id: str, number: int) -> None:
    """Moves the metrics events of a job's training steps from the table `events` into block number `number`, which has
    the metrics of up to 1,000 steps. If the block already has a step, which happens because a resumed job repeats
    steps, the step's row is dropped, because the job's history tells each step once.
    """
    await session.execute(select(Job.id).where(Job.id == job_id).with_for_update(key_share=True))
    first = number * blocks.BLOCK_STEPS + 1
    moving = (Event.job_id == job_id) & Event.step.between(first, first + blocks.BLOCK_STEPS - 1)
    query = select(Event.id, Event.step, Event.created_at, Event.data).where(moving).order_by(Event.step)
    events = (await session.execute(query)).all()
    if not events:
        return
    of_block = select(StepBlock.parquet).where(StepBlock.job_id == job_id, StepBlock.number == number)
    work = partial(_packed, await session.scalar(of_block), events)
    # The job's row is locked meanwhile. With a limiter of its own, the work waits for no other work in threads.
    packed = await anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))
    row = insert(StepBlock).values(job_id=job_id, number=number, **packed)
    await session.execute(row.on_conflict_do_update(index_elements=[StepBlock.job_id, StepBlock.number], set_=packed))
    await session.execute(delete(Event).where(moving))


def _packed(known: bytes | None, events: Any) -> dict[str, Any]:
    """Returns the columns of a row of StepBlock, which stores one block (the metrics of up to 1,000 training steps), as
    a dictionary from the names of the columns to their values.

    `known` is the block as it is stored now, as bytes; None if it is not stored yet. `events` are rows of the table
    `events`; their steps are added to the block.
    """
    block = blocks.block_of(events)
    if known is not None:
        block = blocks.with_new_steps(blocks.from_bytes(known), block)
    numbers, steps = block["event_id"].to_pylist(), block["step"].to_pylist()
    return {
        "first_event": min(numbers),
        "last_event": max(numbers),
        "steps": _ranges(steps),
        "metrics": blocks.names_of(block),
        "parquet": blocks.to_bytes(block),
        "sums": blocks.sums_of(block),
    }


def _ranges(steps: list[int]) -> MultiRange[int]:
    """Returns the training steps `steps`, which are sorted, as ranges of consecutive steps. The end of a range is not
    part of it.
    """
    starts = [step for before, step in zip([None, *steps], steps, strict=False) if before != step - 1]
    ends = [step for step, after in zip(steps, [*steps[1:], None], strict=True) if after != step + 1]
    return MultiRange(Range(start, end + 1) for start, end in zip(starts, ends, strict=True))

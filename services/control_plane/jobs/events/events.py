"""Reads the events of jobs, and the metrics of their training steps.

A metrics event tells the metrics of one training step. At first it is a row of the table `events`. Later it moves into
a block, a compact table of many steps (module `blocks`). The functions here read both places. An event may move between
two statements, so all statements of a session must see the database at the same moment.

The text and the public id of a metrics event are not stored in a block: they follow from the step and its metrics.
"""

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import anyio.to_thread
import pyarrow.compute as pc
from sqlalchemy import BigInteger, ColumnElement, Text, cast, column, exists, func, select, true, values
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.tables import Event, StepBlock
from services.control_plane.jobs.events import blocks

EVENT = (Event.id, Event.job_id, Event.public_id, Event.created_at, Event.level, Event.type, Event.message, Event.data)
LAST = 2**63 - 1  # greater than the id of every event


def step_event_id(job_id: str, step: int) -> str:
    """Returns the public id of the event that tells the metrics of the training step `step` of the job."""
    return f"{_beginning(job_id)}{step:08x}"


def _beginning(job_id: str) -> str:
    return f"ftevent-{hashlib.sha256(job_id.encode()).hexdigest()[:16]}"


def step_message(data: Mapping[str, Any]) -> str:
    """Returns the text of the event that tells the metrics of one training step. `data` has the step (`step`), the
    number of all steps (`total_steps`), and the metrics under OpenAI's names, such as `train_loss`."""
    words = [f"training loss={data['train_loss']:.4f}"]
    if "train_reward_margin" in data:
        words.append(f"margin={data['train_reward_margin']:.4f}")
    if "train_reward_accuracy" in data:  # rows of a single answer have a margin, but no pair to be right about
        words.append(f"accuracy={data['train_reward_accuracy']:.3f}")
    if "full_valid_loss" in data:
        words.append(f"full validation loss={data['full_valid_loss']:.4f}")
    of_all = f"/{data['total_steps']}" if "total_steps" in data else ""
    return f"Step {data['step']}{of_all}: {', '.join(words)}"


def is_packed(job_id: str, step: int) -> ColumnElement[bool]:
    """Returns the SQL condition that the training step `step` of the job is already in a block, a table that keeps the
    metrics of many past steps."""
    block = (StepBlock.job_id == job_id) & (StepBlock.number == blocks.number_of(step))
    return exists().where(block, StepBlock.steps.contains(cast(step, BigInteger)))


# --- events ----------------------------------------------------------------------------------


async def place_of(session: AsyncSession, job_id: str, public_id: str) -> int | None:
    """Returns the number of the event with the id `public_id`, if the event belongs to the job. The numbers give the
    order of a job's events. Returns None if the job has no such event."""
    query = select(Event.id).where(Event.public_id == public_id, Event.job_id == job_id)
    if (place := await session.scalar(query)) is not None:
        return place
    digits = public_id.removeprefix(_beginning(job_id))
    try:
        step = int(digits, 16)
    except ValueError:
        return None
    if step_event_id(job_id, step) != public_id:
        return None
    of_step = (StepBlock.job_id == job_id) & (StepBlock.number == blocks.number_of(step))
    data = await session.scalar(select(StepBlock.parquet).where(of_step))
    return None if data is None else await anyio.to_thread.run_sync(_place_of_step, data, step)


def _place_of_step(data: bytes, step: int) -> int | None:
    found = blocks.from_bytes(data).filter(pc.field("step") == step)["event_id"].to_pylist()
    return found[0] if found else None


async def page(session: AsyncSession, job_id: str, *, before: int | None, type: str | None, limit: int) -> list[Any]:
    """Returns the newest `limit` events of the job whose numbers are less than `before`, newest first. If `before` is
    None, begins with the newest event. If `type` is given, returns only events of this type.
    """
    query = select(*EVENT).where(Event.job_id == job_id, Event.id < (before or LAST))
    query = query if type is None else query.where(Event.type == type)
    rows = (await session.execute(query.order_by(Event.id.desc()).limit(limit))).all()
    if type == "message":
        return list(rows)
    return await _with_packed(session, job_id, rows, before=before or LAST, limit=limit, newest=True)


async def next_events(session: AsyncSession, job_id: str, after: int, *, limit: int) -> Sequence[Any]:
    """Returns the next `limit` events of the job, in the order of their numbers. `after` is the number of the last
    event that the caller has already (0 for none)."""
    query = select(*EVENT).where(Event.job_id == job_id, Event.id > after).order_by(Event.id).limit(limit)
    rows = (await session.execute(query)).all()
    return await _with_packed(session, job_id, rows, after=after, limit=limit, newest=False)


async def newest_events(session: AsyncSession, after: Mapping[str, int], *, limit: int) -> Sequence[Any]:
    """Returns the newest `limit` events of each job in `after`, in the order of their numbers.

    `after` maps the id of a job to the number of the last event that the caller has already; only later events are
    returned.
    """
    asked = values(column("job_id", Text), column("after", BigInteger), name="asked").data(list(after.items()))
    newest = (
        select(*EVENT)
        .where(Event.job_id == asked.c.job_id, Event.id > asked.c.after)
        .order_by(Event.id.desc())
        .limit(limit)
        .lateral("newest")
    )
    rows = (await session.execute(select(newest).select_from(asked).join(newest, true()))).all()
    later = exists().where(StepBlock.job_id == asked.c.job_id, StepBlock.last_event > asked.c.after)
    found = {job_id: [row for row in rows if row.job_id == job_id] for job_id in {row.job_id for row in rows}}
    for job_id in await session.scalars(select(asked.c.job_id).where(later)):
        known = found.get(job_id, [])
        found[job_id] = await _with_packed(session, job_id, known, after=after[job_id], limit=limit, newest=True)
    return sorted((event for events in found.values() for event in events), key=lambda event: event.id)


async def _with_packed(
    session: AsyncSession,
    job_id: str,
    rows: Iterable[Any],
    *,
    after: int = 0,
    before: int = LAST,
    limit: int,
    newest: bool,
) -> list[Any]:
    """Returns the job's first `limit` events with numbers between `after` and `before`; neither end is included. The
    order is newest first if `newest` is true, and oldest first otherwise.

    Some of these events are rows of the table `events`; the caller has found them and gives them as `rows`. The other
    ones are in blocks, which are tables that keep the metrics events of past steps. The function reads these blocks.
    """
    found = {row.id: row for row in rows}
    edge = StepBlock.last_event if newest else StepBlock.first_event
    query = select(edge.label("edge"), StepBlock.parquet).where(StepBlock.job_id == job_id)
    query = query.where(StepBlock.last_event > after, StepBlock.first_event < before)
    query = query.order_by(edge.desc() if newest else edge).limit(1)
    while True:
        if len(found) == limit:  # only blocks with events between those found are read
            query = query.where(edge > min(found) if newest else edge < max(found))
        block = (await session.execute(query)).first()
        if block is None:
            return list(found.values())
        packed = partial(_events, job_id, block.parquet, after=after, before=before, limit=limit, newest=newest)
        found |= {event.id: event for event in await anyio.to_thread.run_sync(packed)}
        found = {number: found[number] for number in sorted(found, reverse=newest)[:limit]}
        query = query.where(edge < block.edge if newest else edge > block.edge)


def _events(job_id: str, data: bytes, *, after: int, before: int, limit: int, newest: bool) -> list[Event]:
    """Returns the first `limit` metrics events of a block (a table with the metrics of past steps) whose numbers are
    between `after` and `before`; neither end is included. The order is newest first if `newest` is true, and oldest
    first otherwise.

    `data` are the block's bytes. The events are objects of the class Event, as they were in the table `events` before
    they moved into the block.
    """
    place = pc.field("event_id")
    block = blocks.from_bytes(data).filter((place > after) & (place < before))
    block = block.sort_by([("event_id", "descending" if newest else "ascending")]).slice(0, limit)
    moments, numbers = block["created_at"].to_pylist(), block["event_id"].to_pylist()
    return [
        Event(
            id=number,
            job_id=job_id,
            public_id=step_event_id(job_id, told["step"]),
            created_at=datetime.fromtimestamp(moment, UTC),
            level="info",
            type="metrics",
            message=step_message(told),
            data=told,
        )
        for number, moment, told in zip(numbers, moments, blocks.steps_of(block), strict=True)
    ]


# --- metrics ---------------------------------------------------------------------------------


async def metric_names(session: AsyncSession, job_id: str) -> set[str]:
    """Returns the names of all metrics that the job's training reported."""
    of_rows = select(func.jsonb_object_keys(Event.data)).where(Event.job_id == job_id, Event.step.is_not(None))
    of_blocks = select(func.unnest(StepBlock.metrics)).where(StepBlock.job_id == job_id)
    return set(await session.scalars(of_rows.union(of_blocks))) - blocks.FIXED.keys()


async def metrics_of(session: AsyncSession, job_id: str) -> AsyncIterator[list[dict[str, Any]]]:
    """Yields all metrics that the job's training reported, as lists of dictionaries. A list has at most BLOCK_STEPS
    training steps in order, with one dictionary for each step.

    All statements of the session must see the database at the same moment.
    """
    in_rows, in_blocks = Event.job_id == job_id, StepBlock.job_id == job_id
    number = (Event.step - 1) // blocks.BLOCK_STEPS
    some = select(number).where(in_rows, Event.step.is_not(None)).union(select(StepBlock.number).where(in_blocks))
    for found in sorted(number for (number,) in await session.execute(some) if number is not None):
        packed = await session.scalar(select(StepBlock.parquet).where(in_blocks, StepBlock.number == found))
        first = found * blocks.BLOCK_STEPS + 1
        query = select(Event.data).where(in_rows, Event.step.between(first, first + blocks.BLOCK_STEPS - 1))
        new = [data for data in await session.scalars(query) if data is not None]
        yield await anyio.to_thread.run_sync(_in_order, new, packed)


def _in_order(new: list[dict[str, Any]], packed: bytes | None) -> list[dict[str, Any]]:
    """Returns the metrics of the rows `new` and of the block with the bytes `packed`, each step once, in order."""
    steps = [] if packed is None else blocks.steps_of(blocks.from_bytes(packed))
    return sorted({data["step"]: data for data in (*new, *steps)}.values(), key=lambda data: data["step"])

"""Returns the metrics of a job's training as lists of values, one value for each bucket (a range of training steps).

The database adds up the steps that are rows of the table `events`. Older steps are in blocks, which this module reads.
"""

from typing import Annotated, Any

import anyio.to_thread
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ARRAY, ColumnElement, Double, case, func, literal, select, true
from sqlalchemy.dialects.postgresql import Range as SqlRange
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.dialects.postgresql.ranges import MultiRange
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.tables import Event, StepBlock
from services.control_plane.jobs.events.blocks import (
    SUM_STEPS,
    SUMS,
    added_up,
    from_bytes,
    number_of,
    sums_from_bytes,
    values_of,
)

MOST_POINTS = 10_000  # the most buckets of steps that a request may ask for
MOST_READ = 50_000  # the most steps whose values are read one by one
STATISTICS = ("mean", "min", "max", "last")

Step = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Range(BaseModel):
    """The query parameters of a request for metrics: the range of training steps, and the largest number of points to
    return.

    If `to` is None, the range ends at the newest step.
    """

    model_config = ConfigDict(extra="forbid")
    first: Step = Field(default=1, alias="from")
    last: Step | None = Field(default=None, alias="to")
    resolution: int = Field(default=1_000, ge=1, le=MOST_POINTS)


async def series(session: AsyncSession, job_id: str, asked: Range) -> dict[str, Any]:
    """Returns the job's metrics as columns: lists with one value for each bucket of steps. The range of steps in
    `asked` is divided into buckets of equal size.

    Each metric has four columns: its mean, least, greatest and last value in each bucket. A value is None if no step of
    the bucket has the metric. If the range has more than MOST_READ steps, only sums over 100 steps are read, so buckets
    begin at step 1, 101, 201 and so on. All statements of the session must see the database at the same moment. Raises
    InvalidRequest if the range ends before it begins.
    """
    if asked.last is not None and asked.last < asked.first:
        raise InvalidRequest(
            f"The query parameter 'to' is {asked.last}, which is less than 'from', {asked.first}; send a range "
            "whose end is not before its start.",
            param="to",
        )
    known = await _known(session, job_id, asked.first, asked.last or 2**31 - 1)
    if known is None:
        return {"bucket_steps": 1, "steps": [], "metrics": {}}
    first, last = known
    adds = last - first >= MOST_READ
    start = first - (first - 1) % SUM_STEPS if adds else first
    width = -(-(last - start + 1) // asked.resolution)
    width = -(-width // SUM_STEPS) * SUM_STEPS if adds else width
    rows = [row._asdict() for row in await session.execute(_buckets(job_id, first, last, start, width))]
    packed = await _packed(session, job_id, first, last, adds=adds)
    found = await anyio.to_thread.run_sync(_merged, rows, packed, first, last, start, width)
    places = {bucket: place for place, bucket in enumerate(sorted({(row["step"] - start) // width for row in found}))}
    steps = [0] * len(places)
    metrics: dict[str, dict[str, list[float | None]]] = {}
    for row in found:
        place = places[(row["step"] - start) // width]
        steps[place] = max(steps[place], row["step"])
        columns = metrics.setdefault(row["metric"], {name: [None] * len(places) for name in STATISTICS})
        for name in STATISTICS:
            columns[name][place] = row["sum"] / row["count"] if name == "mean" else row[name]
    return {"bucket_steps": width, "steps": steps, "metrics": dict(sorted(metrics.items()))}


async def _known(session: AsyncSession, job_id: str, first: int, last: int) -> tuple[int, int] | None:
    """Returns the lowest and the highest step for which the job's metrics are stored, among the steps from `first` to
    `last`. Returns None if there is no such step.
    """
    in_rows = select(func.min(Event.step), func.max(Event.step)).where(Event.job_id == job_id)
    within = StepBlock.steps * MultiRange([SqlRange(first, last + 1)])
    in_blocks = select(func.min(func.lower(within)), func.max(func.upper(within)) - 1)
    in_blocks = in_blocks.where(*_overlapping(job_id, first, last), ~func.isempty(within))
    found = [
        *(await session.execute(in_rows.where(Event.step.between(first, last)))).one(),
        *(await session.execute(in_blocks)).one(),
    ]
    steps = [step for step in found if step is not None]
    return (min(steps), max(steps)) if steps else None


def _overlapping(job_id: str, first: int, last: int) -> tuple[ColumnElement[bool], ...]:
    return StepBlock.job_id == job_id, StepBlock.number.between(number_of(first), number_of(last))


def _buckets(job_id: str, first: int, last: int, start: int, width: int) -> Any:
    """Returns an SQL query that adds up each metric of a job in each bucket of steps. The query reads only steps whose
    metrics are still rows of the table `events`; older steps are in blocks.

    Bucket n has the steps from `start` + n * `width`. The query gives one row for each bucket and metric, with the
    columns of SUMS, such as the number of values, their sum and the last one.
    """
    numbers = func.jsonb_each(Event.data).table_valued("key", "value").lateral("numbers")
    value = numbers.c.value.cast(Double)
    bucket = ((Event.step - start) // width).label("bucket")
    newest = func.array_agg(aggregate_order_by(value, Event.step.desc()), type_=ARRAY(Double))
    extremes = (func.min(value).label("min"), func.max(value).label("max"))
    return (
        select(numbers.c.key.label("metric"), func.max(Event.step).label("step"), func.count().label("count"))
        .add_columns(func.sum(value).label("sum"), *extremes, newest[1].label("last"))
        .select_from(Event)
        .join(numbers, true())
        .where(Event.job_id == job_id, Event.step.between(first, last))
        .where(func.jsonb_typeof(numbers.c.value) == "number", numbers.c.key.not_in(("step", "total_steps")))
        .group_by(bucket, numbers.c.key)
    )


async def _packed(session: AsyncSession, job_id: str, first: int, last: int, *, adds: bool) -> list[tuple[bool, bytes]]:
    """Returns the bytes of the job's blocks that have steps from `first` to `last`. A block is a table with the metrics
    of up to 1,000 training steps, stored as bytes. The result has a pair for each block:

    - True if the bytes are the block's sums over each 100 steps; False if they are the whole table, with one row for
      each step
    - the bytes

    The bytes are the sums if `adds` is true and all steps of the block are from `first` to `last`.
    """
    whole = (func.lower(StepBlock.steps) >= first) & (func.upper(StepBlock.steps) <= last + 1) & literal(adds)
    data = case((whole, StepBlock.sums), else_=StepBlock.parquet)
    query = select(whole.label("whole"), data).where(*_overlapping(job_id, first, last)).order_by(StepBlock.number)
    return [(are_sums, data) for are_sums, data in await session.execute(query)]


def _merged(
    rows: list[dict[str, Any]], packed: list[tuple[bool, bytes]], first: int, last: int, start: int, width: int
) -> list[dict[str, Any]]:
    """Adds up the metrics of a job in each bucket of steps. Returns a dictionary for each bucket and metric, with the
    columns of SUMS, such as the number of values, their sum and the last one.

    `rows` are dictionaries with these columns for the steps that are not in blocks (tables with the metrics of many
    steps). `packed` are the pairs that `_packed` returns for the blocks. Bucket n has the steps from `start` + n *
    `width`; only steps from `first` to `last` count.
    """
    parts = [pa.Table.from_pylist(rows, schema=SUMS)]
    within = (pc.field("step") >= first) & (pc.field("step") <= last)
    for are_sums, data in packed:
        parts.append(sums_from_bytes(data) if are_sums else values_of(from_bytes(data).filter(within)))
    return list(added_up(pa.concat_tables(parts), start, width).to_pylist())

"""Returns the metrics of a job's training as lists of values, one value for each bucket (a range of training steps).
The database summarizes the steps of a bucket.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ARRAY, Double, func, select, true
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.tables import Event

MOST_POINTS = 10_000  # the most buckets of steps that a request may ask for
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
    the bucket has the metric. Raises InvalidRequest if the range ends before it begins.
    """
    if asked.last is not None and asked.last < asked.first:
        raise InvalidRequest(
            f"The query parameter 'to' is {asked.last}, which is less than 'from', {asked.first}; send a range "
            "whose end is not before its start.",
            param="to",
        )
    within = Event.step.between(asked.first, asked.last if asked.last is not None else 2**31 - 1)
    known = select(func.min(Event.step), func.max(Event.step)).where(Event.job_id == job_id, within)
    first, last = (await session.execute(known)).one()
    if first is None or last is None:
        return {"bucket_steps": 1, "steps": [], "metrics": {}}
    width = -(-(last - first + 1) // asked.resolution)
    rows = (await session.execute(_buckets(job_id, first, last, width))).all()
    places = {bucket: place for place, bucket in enumerate(sorted({row.bucket for row in rows}))}
    steps = [0] * len(places)
    metrics: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        place = places[row.bucket]
        steps[place] = max(steps[place], row.step)
        columns = metrics.setdefault(row.key, {name: [None] * len(places) for name in STATISTICS})
        for name in STATISTICS:
            columns[name][place] = getattr(row, name)
    return {"bucket_steps": width, "steps": steps, "metrics": dict(sorted(metrics.items()))}


def _buckets(job_id: str, first: int, last: int, width: int) -> Any:
    """Returns the SQL query for the mean, least, greatest and last value of each metric of a job in each bucket of
    steps.

    The steps from `first` to `last` are divided into buckets of `width` steps. The query gives one row for each bucket
    and metric.
    """
    numbers = func.jsonb_each(Event.data).table_valued("key", "value").lateral("numbers")
    value = numbers.c.value.cast(Double)
    bucket = ((Event.step - first) // width).label("bucket")
    newest = func.array_agg(aggregate_order_by(value, Event.step.desc()), type_=ARRAY(Double))
    statistics = (func.avg(value).label("mean"), func.min(value).label("min"), func.max(value).label("max"))
    return (
        select(bucket, numbers.c.key, func.max(Event.step).label("step"), *statistics, newest[1].label("last"))
        .select_from(Event)
        .join(numbers, true())
        .where(Event.job_id == job_id, Event.step.between(first, last))
        .where(func.jsonb_typeof(numbers.c.value) == "number", numbers.c.key.not_in(("step", "total_steps")))
        .group_by(bucket, numbers.c.key)
    )

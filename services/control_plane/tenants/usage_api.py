"""The route /v1/x/usage, which lists how many requests, tokens and accelerator seconds projects and keys used."""

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from sqlalchemy import cast, func, select
from sqlalchemy.types import Text

from services.control_plane.core.documents import Page, answers
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.responses import listing
from services.control_plane.core.tables import UsageRow
from services.control_plane.http.dependencies import CallerPart, Limit, StorePart
from services.control_plane.tenants.documents import UsageDocument

router = APIRouter(prefix="/x/usage")

DAYS = 30  # the number of days that are listed if the request has no `from`
GROUPS = {"project": UsageRow.project_id, "key": UsageRow.key_id, "model": UsageRow.model_id, "day": UsageRow.day}
SUMS = (
    UsageRow.num_requests,
    UsageRow.prompt_tokens,
    UsageRow.completion_tokens,
    UsageRow.accelerator_seconds,
)


@router.get("", responses=answers(Page[UsageDocument]))
async def list_usage(
    store: StorePart,
    caller: CallerPart,
    begin: Annotated[date | None, Query(alias="from")] = None,
    to: date | None = None,
    group_by: Literal["project", "key", "model", "day"] = "project",
    project_id: str | None = None,
    after: str | None = None,
    limit: Limit = 20,
) -> dict[str, Any]:
    """Lists how many requests and tokens completions used, and for how many accelerator seconds. The query parameter
    `group_by` decides what each entry sums up: a project, a key, a model or a day.

    The days `from` and `to` are included; days are in UTC. If `project_id` is given, lists only the usage of this
    project.
    """
    last = to or datetime.now(UTC).date()
    first = begin or max(last, date.min + timedelta(days=DAYS)) - timedelta(days=DAYS - 1)
    if first > last:
        raise InvalidRequest(
            f"The query parameter 'from' is {first}, which is after 'to', {last}; send a first day that is not "
            "after the last day.",
            param="from",
        )
    group = cast(GROUPS[group_by], Text)
    query = select(group, *(func.sum(column) for column in SUMS)).where(UsageRow.day.between(first, last))
    if not caller.manages_all:
        query = query.where(UsageRow.project_id == caller.project_id)
    if project_id is not None:
        query = query.where(UsageRow.project_id == project_id)
    async with store.look() as session:
        if after is not None and await session.scalar(query.where(group == after).group_by(group)) is None:
            raise InvalidRequest(
                f"The query parameter 'after' is '{after}', but the list has no item with this id; send the id of "
                "an item that you have listed.",
                param="after",
            )
        query = query if after is None else query.where(group > after)
        rows = (await session.execute(query.group_by(group).order_by(group).limit(limit + 1))).all()
    return listing([_usage_object(group_by, first, last, row) for row in rows[:limit]], len(rows) > limit)


def _usage_object(group_by: str, first: date, last: date, row: Any) -> dict[str, Any]:
    name, *sums = row
    values = (
        int(value) if column is not UsageRow.accelerator_seconds else round(float(value), 3)
        for column, value in zip(SUMS, sums, strict=True)
    )
    told = dict(zip((column.key for column in SUMS), values, strict=True))
    return {"id": name, "object": "usage", "group_by": group_by, "from": str(first), "to": str(last), **told}

"""Stores, finds, counts and removes votes on completions, and writes the votes as lines of a training file."""

import json
import secrets
from typing import Any, BinaryIO

import anyio.to_thread
from sqlalchemy import Select, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import NotFound
from services.control_plane.core.store import ProjectStore, project_of
from services.control_plane.core.tables import Feedback
from services.control_plane.feedback.requests import Vote
from services.control_plane.files import files

AT_A_TIME = 50  # rows in memory while a file is written; a row may have a megabyte


async def add(session: AsyncSession, vote: Vote) -> Feedback:
    """Stores the vote, and returns its database row. Raises OverQuota if the bytes of the row would exceed the
    project's limit.
    """
    feedback_id = f"fb-{secrets.token_hex(12)}"
    row = {**vote.row, "feedback": {"id": feedback_id, **vote.row["feedback"]}}
    num_bytes = len(_line(row))
    await files.reserve(session, project_of(session), num_bytes, param="completions")
    stored = Feedback(id=feedback_id, vote=vote.name, kind=vote.kind, form=vote.form, row=row, num_bytes=num_bytes)
    session.add(stored)
    await session.flush()
    await session.refresh(stored)
    return stored


async def find(session: AsyncSession, feedback_id: str) -> Feedback:
    if (row := await session.scalar(select(Feedback).where(Feedback.id == feedback_id))) is None:
        raise NotFound(
            f"There is no feedback with the id '{feedback_id}'; list the feedback for its ids.",
            param="feedback_id",
            code="feedback_not_found",
        )
    return row


async def remove(session: AsyncSession, feedback_id: str) -> None:
    """Deletes the vote. Training files that were made before still contain the vote. Raises NotFound if there is no
    such vote.
    """
    await session.delete(await find(session, feedback_id))


def of_kind(kind: str | None, form: str | None) -> Select[Feedback]:
    """Returns the SQL query for the votes of this kind and form.

    `kind` is the kind of vote (`pairs`, `unpaired` or `ratings`), and `form` the form of its prompt (`messages` or
    `text`). If `kind` or `form` is None, the query includes votes of every kind or form.
    """
    query = select(Feedback)
    if kind is not None:
        query = query.where(Feedback.kind == kind)
    return query if form is None else query.where(Feedback.form == form)


async def counts(session: AsyncSession) -> list[dict[str, Any]]:
    """Returns the number of the project's votes of each kind (such as `pairs`) and form (`messages` or `text`).

    Each object of the list has the fields `kind`, `form` and `num_votes`.
    """
    groups = (Feedback.kind, Feedback.form)
    rows = await session.execute(select(*groups, func.count()).group_by(*groups).order_by(*groups))
    return [{"kind": kind, "form": form, "num_votes": number} for kind, form, number in rows]


async def write_rows(store: ProjectStore, kind: str, form: str, file: BinaryIO) -> int:
    """Writes the project's votes of this kind (such as `pairs`) and form (`messages` or `text`) to `file`. Returns the
    number of lines.

    Each vote is one line of JSON. The oldest vote comes first.
    """
    place = tuple_(Feedback.created_at, Feedback.id)
    query, written = of_kind(kind, form).order_by(Feedback.created_at, Feedback.id).limit(AT_A_TIME), 0
    async with store.look() as session:
        rows = list(await session.scalars(query))
    while rows:
        await anyio.to_thread.run_sync(file.writelines, [_line(row.row) for row in rows])
        written += len(rows)
        async with store.look() as session:
            rows = list(await session.scalars(query.where(place > (rows[-1].created_at, rows[-1].id))))
    return written


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"

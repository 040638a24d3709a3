"""The routes below /v1/x/evaluations, which create, list, show, pause, resume, cancel and delete evaluations of models,
and list their items.

An item is one prompt of an evaluation, with the results for this prompt.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.data.groups import Group
from services.control_plane.core.documents import Page, answers
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.responses import deleted, listing
from services.control_plane.core.store import ProjectStore, page
from services.control_plane.core.tables import Evaluation, EvaluationItem
from services.control_plane.evaluations import evaluations, rows
from services.control_plane.evaluations.documents import EvaluationDocument, EvaluationItemDocument, Status
from services.control_plane.evaluations.requests import CreateEvaluation
from services.control_plane.evaluations.responses import as_csv, as_jsonl, columns_of, evaluation_object, item_object
from services.control_plane.evaluations.work import kind_of
from services.control_plane.http.dependencies import CallerPart, IdempotentPart, Limit, SettingsPart, StorePart
from services.control_plane.http.idempotency import IdempotentRequest
from services.control_plane.models import models

router = APIRouter(prefix="/x/evaluations")

READ_AT_ONCE = 100  # items, for a download


@router.post("", responses=answers(EvaluationDocument))
async def create(
    idempotent: IdempotentPart, store: StorePart, caller: CallerPart, settings: SettingsPart, body: CreateEvaluation
) -> Response:
    """Creates an evaluation of a model. The service works on it in the background."""
    body.check()
    async with store.look() as session:
        kind = await kind_of(session, settings, body)
    groups = await groups_of(store, body)
    check(body, groups)
    stored = rows.to_json(groups)

    async def submit(session: AsyncSession) -> dict[str, Any]:
        spec = body.spec(**kind.resolved)
        await models.hold(session, settings, spec.models)
        return evaluation_object(await evaluations.create(session, spec, stored, kind.num_stages, caller.key_id))

    return await idempotent.act(submit)


async def groups_of(store: ProjectStore, body: CreateEvaluation) -> list[Group]:
    """Returns the rows of the request, or of the file that the request names, as groups: prompts with their
    completions.
    """
    return await rows.read(store, body.rows, body.file, body.max_items, only_labelled=body.kind == "preferences")


def check(body: CreateEvaluation, groups: list[Group]) -> None:
    """Raises InvalidRequest if a row lacks the completions that this kind of evaluation needs.

    `groups` are the rows: prompts with their completions.
    """
    where = "rows" if body.rows is not None else "file"
    if body.kind == "preferences":
        for group in groups:
            if not rows.labelled(group):
                message = f"Row {group.line} needs at least two completions, the best one first."
                raise InvalidRequest(message, param=f"rows.{group.line - 1}.completions")
    if body.judge is not None:
        rows.check_expected(groups, body.judge, where)


@router.get("", responses=answers(Page[EvaluationDocument]))
async def list_evaluations(
    store: StorePart, after: str | None = None, limit: Limit = 20, status: Status | None = None
) -> dict[str, Any]:
    """Lists the project's evaluations, newest first. If `status` is given, lists only evaluations with this status."""
    query = select(Evaluation)
    if status is not None:
        query = query.where(Evaluation.state == status)
    async with store.look() as session:
        keys = [Evaluation.created_at, Evaluation.id]
        found, more = await page(session, query, keys, after=after, limit=limit)
    return listing(list(map(evaluation_object, found)), more)


@router.get("/{evaluation_id}", responses=answers(EvaluationDocument))
async def retrieve(store: StorePart, evaluation_id: str) -> dict[str, Any]:
    async with store.look() as session:
        return evaluation_object(await evaluations.find(session, evaluation_id))


@router.post("/{evaluation_id}/cancel", responses=answers(EvaluationDocument))
async def cancel(idempotent: IdempotentPart, evaluation_id: str) -> Response:
    """Cancels an evaluation that has not ended. The results so far are kept."""
    return await _change(evaluations.cancel, idempotent, evaluation_id)


@router.post("/{evaluation_id}/pause", responses=answers(EvaluationDocument))
async def pause(idempotent: IdempotentPart, evaluation_id: str) -> Response:
    """Pauses an evaluation that has not ended. The results so far are kept."""
    return await _change(evaluations.pause, idempotent, evaluation_id)


@router.post("/{evaluation_id}/resume", responses=answers(EvaluationDocument))
async def resume(idempotent: IdempotentPart, evaluation_id: str) -> Response:
    """Queues a paused evaluation again. The evaluation then goes on where it stopped."""
    return await _change(evaluations.resume, idempotent, evaluation_id)


async def _change(
    change: Callable[[AsyncSession, str], Awaitable[Evaluation]], idempotent: IdempotentRequest, evaluation_id: str
) -> Response:
    async def act(session: AsyncSession) -> dict[str, Any]:
        return evaluation_object(await change(session, evaluation_id))

    return await idempotent.act(act, changes=evaluation_id)


@router.delete("/{evaluation_id}")
async def delete(idempotent: IdempotentPart, evaluation_id: str) -> Response:
    """Deletes an evaluation that has ended, with its items (prompts) and results."""

    async def remove(session: AsyncSession) -> dict[str, Any]:
        await evaluations.remove(session, evaluation_id)
        return deleted("evaluation", evaluation_id)

    return await idempotent.act(remove, changes=evaluation_id)


After = Annotated[int | None, Query(ge=-1, lt=2**31)]


@router.get("/{evaluation_id}/items", responses=answers(Page[EvaluationItemDocument]))
async def items(store: StorePart, evaluation_id: str, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Lists the items of an evaluation (its prompts), in the order of their rows, each with its results so far."""
    async with store.look() as session:
        evaluation = await evaluations.find(session, evaluation_id)
        query = select(EvaluationItem).where(EvaluationItem.evaluation_id == evaluation_id)
        found, more = await page(session, query, [EvaluationItem.number], after=after, limit=limit, descending=False)
    return listing([item_object(row, evaluation.num_stages) for row in found], more)


@router.get("/{evaluation_id}/content", response_class=StreamingResponse)
async def content(store: StorePart, evaluation_id: str, format: Literal["jsonl", "csv"] = "jsonl") -> Response:
    """Downloads all items of an evaluation (its prompts with their results). `format` is the format of the download:
    JSON Lines or CSV."""
    async with store.look() as session:
        evaluation = await evaluations.find(session, evaluation_id)
    headers = {"content-disposition": f'attachment; filename="{evaluation.id}.{format}"'}
    media_type = "application/jsonl" if format == "jsonl" else "text/csv"
    return StreamingResponse(_content(store, evaluation, format), headers=headers, media_type=media_type)


async def _content(store: ProjectStore, evaluation: Evaluation, format: str) -> AsyncIterator[bytes]:
    """Yields the bytes of a file with all items of the evaluation (its prompts with their results), in parts to save
    memory.

    `format` is `jsonl` or `csv`. A CSV file has a column for every value that at least one item has.
    """
    columns: dict[str, None] = {}
    if format == "csv":
        async for part in _parts(store, evaluation):
            columns |= dict.fromkeys(name for item in part for name in columns_of(item))
    with_header = True
    async for part in _parts(store, evaluation):
        if format == "csv":
            yield as_csv(list(map(columns_of, part)), list(columns), with_header=with_header)
        else:
            yield as_jsonl(part)
        with_header = False


async def _parts(store: ProjectStore, evaluation: Evaluation) -> AsyncIterator[list[dict[str, Any]]]:
    for first in range(0, evaluation.num_items, READ_AT_ONCE):
        numbers = EvaluationItem.number.between(first, first + READ_AT_ONCE - 1)
        query = select(EvaluationItem).where(EvaluationItem.evaluation_id == evaluation.id, numbers)
        async with store.look() as session:
            found = await session.scalars(query.order_by(EvaluationItem.number))
            part = [item_object(row, evaluation.num_stages) for row in found]
        yield part

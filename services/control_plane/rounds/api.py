"""The routes below /v1/x/rounds, which create, list, show, pause, resume, cancel and delete sets of rounds. A set of
rounds improves a policy by repeated training on its own answers."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.auth.keys import Caller
from services.control_plane.core.documents import Page, answers
from services.control_plane.core.responses import deleted, listing
from services.control_plane.core.store import page
from services.control_plane.core.tables import Rounds
from services.control_plane.http.dependencies import (
    CallerPart,
    IdempotentPart,
    Limit,
    RayApiPart,
    SettingsPart,
    StorePart,
)
from services.control_plane.http.idempotency import IdempotentRequest
from services.control_plane.models import models
from services.control_plane.rounds import checks, rounds
from services.control_plane.rounds.documents import RoundsDocument, Status
from services.control_plane.rounds.requests import CreateRounds
from services.control_plane.rounds.responses import rounds_object

router = APIRouter(prefix="/x/rounds")


@router.post("", responses=answers(RoundsDocument))
async def create(
    idempotent: IdempotentPart,
    store: StorePart,
    caller: CallerPart,
    settings: SettingsPart,
    ray_api: RayApiPart,
    body: CreateRounds,
) -> Response:
    """Creates a set of rounds, which improves a policy by repeated training on its own scored answers. The service
    works on the rounds in the background."""
    body.check()
    sampled, held_out = await checks.prompts_of(store, body)
    await checks.check_rows(store, body.spec())

    async def submit(session: AsyncSession) -> dict[str, Any]:
        await checks.check(session, settings, ray_api, body.spec())
        await models.hold(session, settings, body.models)
        return rounds_object(await rounds.create(session, body.spec(), sampled, held_out, caller.key_id))

    return await idempotent.act(submit)


@router.get("", responses=answers(Page[RoundsDocument]))
async def list_rounds(
    store: StorePart, after: str | None = None, limit: Limit = 20, status: Status | None = None
) -> dict[str, Any]:
    """Lists the project's sets of rounds, newest first. A set of rounds improves a policy by repeated training on its
    own answers. If `status` is given, lists only sets with this status."""
    query = select(Rounds)
    if status is not None:
        query = query.where(Rounds.state == status)
    async with store.look() as session:
        found, more = await page(session, query, [Rounds.created_at, Rounds.id], after=after, limit=limit)
    return listing(list(map(rounds_object, found)), more)


@router.get("/{rounds_id}", responses=answers(RoundsDocument))
async def retrieve(store: StorePart, rounds_id: str) -> dict[str, Any]:
    async with store.look() as session:
        return rounds_object(await rounds.find(session, rounds_id))


@router.post("/{rounds_id}/pause", responses=answers(RoundsDocument))
async def pause(idempotent: IdempotentPart, caller: CallerPart, rounds_id: str) -> Response:
    """Pauses a set of rounds (repeated training of a policy on its own answers) that has not ended. If a job or
    evaluations of the set are under way, pauses them, too."""
    return await _wish(rounds.pause, idempotent, caller, rounds_id)


@router.post("/{rounds_id}/resume", responses=answers(RoundsDocument))
async def resume(idempotent: IdempotentPart, caller: CallerPart, rounds_id: str) -> Response:
    """Resumes a paused set of rounds (repeated training of a policy on its own answers) where it stopped."""
    return await _wish(rounds.resume, idempotent, caller, rounds_id)


@router.post("/{rounds_id}/cancel", responses=answers(RoundsDocument))
async def cancel(idempotent: IdempotentPart, caller: CallerPart, rounds_id: str) -> Response:
    """Cancels a set of rounds (repeated training of a policy on its own answers) that has not ended. If a job or
    evaluations of the set are under way, cancels them, too. What the set has made so far is kept."""
    return await _wish(rounds.cancel, idempotent, caller, rounds_id)


async def _wish(
    wish: Callable[[AsyncSession, str, str], Awaitable[Rounds]],
    idempotent: IdempotentRequest,
    caller: Caller,
    rounds_id: str,
) -> Response:
    async def act(session: AsyncSession) -> dict[str, Any]:
        return rounds_object(await wish(session, rounds_id, caller.key_id))

    return await idempotent.act(act, changes=rounds_id)


@router.delete("/{rounds_id}")
async def delete(idempotent: IdempotentPart, rounds_id: str) -> Response:
    """Deletes the record of a set of rounds (repeated training of a policy on its own answers) that has ended. The
    files, jobs, models and evaluations that the set has made stay."""

    async def remove(session: AsyncSession) -> dict[str, Any]:
        await rounds.remove(session, rounds_id)
        return deleted("rounds", rounds_id)

    return await idempotent.act(remove, changes=rounds_id)

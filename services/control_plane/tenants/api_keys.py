"""The routes below /v1/x/keys, which create, list and revoke API keys."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.auth import keys
from services.control_plane.core.documents import Page, answers
from services.control_plane.core.responses import listing
from services.control_plane.core.store import page
from services.control_plane.core.tables import Key
from services.control_plane.http.dependencies import CallerPart, IdempotentPart, Limit, SettingsPart, StorePart
from services.control_plane.settings import Settings
from services.control_plane.tenants import projects
from services.control_plane.tenants.documents import KeyDocument, NewKeyDocument
from services.control_plane.tenants.requests import CreateKey
from services.control_plane.tenants.responses import key_object

router = APIRouter(prefix="/x/keys")


@router.post("", responses=answers(NewKeyDocument))
async def create(idempotent: IdempotentPart, caller: CallerPart, settings: SettingsPart, body: CreateKey) -> Response:
    """Creates an API key. Only this response has the key's text, in the field `value`."""
    expires_at = datetime.fromtimestamp(body.expires_at, UTC) if body.expires_at else None

    async def make(session: AsyncSession) -> dict[str, Any]:
        project = await projects.find_to_use(session, caller, body.project_id or caller.project_id)
        await projects.lock(session, project.id)  # so that keys that are created at the same time are counted
        await keys.check(session, caller, _limits(body), _limits(settings))
        key, text = await keys.create(
            session,
            project.id,
            name=body.name,
            scopes=body.scopes,
            **_limits(body),
            expires_at=expires_at,
        )
        return {**key_object(key), "value": text}

    return await idempotent.act(make, secret="value")


def _limits(given: CreateKey | Settings) -> dict[str, int | None]:
    return {"requests_per_minute": given.requests_per_minute, "tokens_per_minute": given.tokens_per_minute}


@router.get("", responses=answers(Page[KeyDocument]))
async def list_keys(
    store: StorePart,
    caller: CallerPart,
    project_id: str | None = None,
    after: str | None = None,
    limit: Limit = 20,
) -> dict[str, Any]:
    """Lists API keys, including revoked ones, newest first. If `project_id` is given, lists only the keys of this
    project.
    """
    query = keys.managed_by(caller)
    if project_id is not None:
        query = query.where(Key.project_id == project_id)
    async with store.look() as session:
        rows, more = await page(session, query, [Key.created_at, Key.id], after=after, limit=limit)
    return listing([key_object(row) for row in rows], more)


@router.get("/{key_id}", responses=answers(KeyDocument))
async def retrieve(store: StorePart, caller: CallerPart, key_id: str) -> dict[str, Any]:
    async with store.look() as session:
        return key_object(await keys.find(session, caller, key_id))


@router.post("/{key_id}/revoke", responses=answers(KeyDocument))
async def revoke(idempotent: IdempotentPart, caller: CallerPart, key_id: str) -> Response:
    """Revokes an API key, which stops working within a second."""

    async def act(session: AsyncSession) -> dict[str, Any]:
        return key_object(await keys.revoke(session, caller, key_id))

    return await idempotent.act(act, changes=key_id)

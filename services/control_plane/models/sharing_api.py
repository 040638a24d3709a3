"""The routes below /v1/fine_tuning/checkpoints/{model}/permissions, which share models with other projects.

Ids of models may contain slashes, raw or encoded.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.documents import Page, answers
from services.control_plane.core.responses import deleted, listing
from services.control_plane.core.store import page
from services.control_plane.core.tables import CheckpointPermission
from services.control_plane.http.dependencies import IdempotentPart, Limit, SettingsPart, StorePart
from services.control_plane.http.validation import Text
from services.control_plane.models import models, sharing
from services.control_plane.models.deployments.recent import RecentPart
from services.control_plane.models.documents import PermissionDocument
from services.control_plane.models.responses import permission_object

router = APIRouter(prefix="/fine_tuning/checkpoints/{model_id:path}/permissions")


class SharedWith(BaseModel):
    """The JSON body of POST /v1/fine_tuning/checkpoints/{model}/permissions: the projects with which to share the
    model."""

    model_config = ConfigDict(extra="forbid")
    project_ids: Annotated[list[Text], Field(min_length=1, max_length=100)]


@router.post("", responses=answers(Page[PermissionDocument]))
async def create(idempotent: IdempotentPart, settings: SettingsPart, model_id: str, body: SharedWith) -> Response:
    async def grant(session: AsyncSession) -> dict[str, Any]:
        model = await models.find_own(session, settings, model_id)
        rows = await sharing.grant(session, model, body.project_ids)
        return listing([permission_object(row) for row in rows], False)

    return await idempotent.act(grant, changes=model_id)


@router.get("", responses=answers(Page[PermissionDocument]))
async def list_permissions(
    store: StorePart,
    settings: SettingsPart,
    model_id: str,
    project_id: str | None = None,
    after: str | None = None,
    limit: Limit = 10,
    order: Literal["ascending", "descending"] = "descending",
) -> dict[str, Any]:
    query = select(CheckpointPermission).where(CheckpointPermission.model_id == model_id)
    if project_id is not None:
        query = query.where(CheckpointPermission.project_id == project_id)
    async with store.look() as session:
        await models.find_own(session, settings, model_id)
        rows, more = await page(
            session,
            query,
            [CheckpointPermission.created_at, CheckpointPermission.id],
            after=after,
            limit=limit,
            descending=order == "descending",
        )
    return listing([permission_object(row) for row in rows], more)


@router.delete("/{permission_id}")
async def delete(
    idempotent: IdempotentPart, settings: SettingsPart, recent: RecentPart, model_id: str, permission_id: str
) -> Response:
    async def revoke(session: AsyncSession) -> dict[str, Any]:
        await sharing.revoke(session, await models.find_own(session, settings, model_id), permission_id)
        return deleted("checkpoint.permission", permission_id)

    response = await idempotent.act(revoke, changes=model_id)
    recent.forget()
    return response

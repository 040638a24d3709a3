"""The routes below /v1/models, which list, retrieve and delete models. Ids may contain slashes, raw or encoded."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.removal import remove_bytes
from services.control_plane.core.responses import deleted, listing
from services.control_plane.http.dependencies import IdempotentPart, SettingsPart, StorePart
from services.control_plane.models import deployments, models
from services.control_plane.models.models import NamedModel
from services.control_plane.models.responses import model_object

router = APIRouter(prefix="/models")


@router.get("")
async def list_models(
    store: StorePart,
    settings: SettingsPart,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> Response:
    """Lists base models, then trained models, newest first.

    Pages are long by default, because OpenAI's client reads only the first page.
    """
    async with store.look() as session:
        listed, more = await models.list_page(session, settings, after=after, limit=limit)
    return JSONResponse(listing([model_object(model, settings) for model in listed], more))


@router.get("/{model_id:path}")
async def retrieve(store: StorePart, settings: SettingsPart, model_id: str) -> dict[str, Any]:
    async with store.look() as session:
        return model_object(await models.find(session, settings, model_id), settings)


@router.delete("/{model_id:path}")
async def delete(idempotent: IdempotentPart, settings: SettingsPart, model_id: str) -> Response:
    """Deletes a trained model: the service stops offering and serving the model, and deletes its weights."""
    removed: list[NamedModel] = []

    async def remove(session: AsyncSession) -> dict[str, Any]:
        model = await models.remove(session, settings, model_id)
        await deployments.forget(session, model.app_name)
        removed.append(model)
        return deleted("model", model_id)

    answer = await idempotent.act(remove, changes=model_id)
    for model in removed:
        await remove_bytes(model.source)
    return answer

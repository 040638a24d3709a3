"""The routes below /v1/models, which list, retrieve and delete models. Ids may contain slashes, raw or encoded."""

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.documents import Page, answers
from services.control_plane.core.responses import deleted, listing
from services.control_plane.http.content import answer
from services.control_plane.http.dependencies import IdempotentPart, RayApiPart, SettingsPart, StorePart, WakePart
from services.control_plane.models import deletion, downloads, models
from services.control_plane.models.deployments.recent import RecentPart
from services.control_plane.models.documents import ModelDocument
from services.control_plane.models.downloads import Format
from services.control_plane.models.models import NamedModel
from services.control_plane.models.responses import model_object

router = APIRouter(prefix="/models")


@router.get("", responses=answers(Page[ModelDocument]))
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


@router.get("/{model_id:path}/content")
async def content(
    request: Request,
    store: StorePart,
    settings: SettingsPart,
    ray_api: RayApiPart,
    model_id: str,
    format: Format | None = None,
) -> Response:
    """Returns the files of a trained model as a tar of a Hugging Face folder.

    With the header `Range`, returns only the bytes of the tar that the header names. If `format` is `merged`, an
    adapter is first merged into its base model. Until the merge has finished, the answer is 503 with `retry-after`.
    """
    async with store.look() as session:
        model = await models.find_to_download(session, settings, model_id)
        base = (await models.base_of(session, settings, model)).id if model.adapter else None
        must_merge = downloads.format_of(model, format) == "merged" and model.adapter is not None
        if must_merge:
            await models.check_merged(session, model)
    merged = None
    if must_merge:
        merged = await downloads.merged(model, store, ray_api, settings, request.is_disconnected)
    return await answer(request, await anyio.to_thread.run_sync(downloads.content_of, model, base, merged))


@router.get("/{model_id:path}", responses=answers(ModelDocument))
async def retrieve(store: StorePart, settings: SettingsPart, model_id: str) -> dict[str, Any]:
    async with store.look() as session:
        return model_object(await models.find(session, settings, model_id), settings)


@router.delete("/{model_id:path}")
async def delete(
    idempotent: IdempotentPart, settings: SettingsPart, recent: RecentPart, wake: WakePart, model_id: str
) -> Response:
    """Deletes a trained model: removes it from the lists, unloads it from Ray Serve, and deletes its weights."""
    removed: list[NamedModel] = []

    async def remove(session: AsyncSession) -> dict[str, Any]:
        removed.append(await deletion.delete(session, settings, model_id))
        return deleted("model", model_id)

    response = await idempotent.act(remove, changes=model_id)
    recent.forget()
    wake()  # the reconciler tells the engines
    for model in removed:
        await deletion.remove_files(model, settings)
    return response

"""The routes below /v1/x/deployments, which show and change deployments (how models are served).

Ids of models may contain slashes, raw or encoded.
"""

import asyncio
from typing import Any

import httpx
from fastapi import APIRouter, Response
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.documents import Page, answers
from services.control_plane.core.errors import Unavailable
from services.control_plane.core.responses import listing
from services.control_plane.http.dependencies import (
    CallerPart,
    IdempotentPart,
    Limit,
    RayApiPart,
    SettingsPart,
    StorePart,
)
from services.control_plane.models import models
from services.control_plane.models.deployments import checks, deployments
from services.control_plane.models.deployments import settings as deployment_settings
from services.control_plane.models.deployments.documents import DeploymentDocument
from services.control_plane.models.deployments.engines import engine_of
from services.control_plane.models.deployments.recent import RecentPart
from services.control_plane.models.deployments.responses import deployment_object
from services.control_plane.models.models import NamedModel
from services.control_plane.ray_api import RayApi, ServeView
from services.control_plane.settings import Settings
from services.deployment_settings import DeploymentSettings

router = APIRouter(prefix="/x/deployments")


@router.get("", responses=answers(Page[DeploymentDocument]))
async def list_deployments(
    store: StorePart, settings: SettingsPart, ray_api: RayApiPart, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """Lists deployments (how models are served): first those of base models, then those of trained models, newest
    first."""
    view = await _look(ray_api)
    async with store.look() as session:
        page, more = await models.list_page(session, settings, after=after, limit=limit)
        found = [await _status(session, settings, view, model) for model in page]
    return listing(await asyncio.gather(*(_with_load(ray_api, each) for each in found)), more)


@router.get("/{model_id:path}", responses=answers(DeploymentDocument))
async def retrieve(store: StorePart, settings: SettingsPart, ray_api: RayApiPart, model_id: str) -> dict[str, Any]:
    view = await _look(ray_api)
    async with store.look() as session:
        found = await _status(session, settings, view, await models.find(session, settings, model_id))
    return await _with_load(ray_api, found)


@router.put("/{model_id:path}", responses=answers(DeploymentDocument))
async def change(
    idempotent: IdempotentPart,
    settings: SettingsPart,
    caller: CallerPart,
    ray_api: RayApiPart,
    recent: RecentPart,
    model_id: str,
    body: DeploymentSettings,
) -> Response:
    """Sets how a model is served. Fields that the body leaves out are reset to their defaults.

    If the model is loaded, Ray Serve replaces its replicas; each replica first finishes its answers. There is one
    exception: replicas that compute log-probabilities for a job keep the old settings until the job has all
    log-probabilities.
    """
    view, capacity = await asyncio.gather(_look(ray_api), ray_api.capacity())

    async def choose(session: AsyncSession) -> dict[str, Any]:
        model = await models.find(session, settings, model_id)
        await checks.check_rights(session, settings, caller, model)
        await checks.check(session, settings, caller, model, body, capacity)
        await deployment_settings.choose(session, model.id, body.model_dump(mode="json", exclude_unset=True))
        return deployment_object(await _status(session, settings, view, model), None)

    response = await idempotent.act(choose, changes=model_id)
    recent.forget()
    return response


@router.delete("/{model_id:path}", responses=answers(DeploymentDocument))
async def reset(
    idempotent: IdempotentPart,
    settings: SettingsPart,
    caller: CallerPart,
    ray_api: RayApiPart,
    recent: RecentPart,
    model_id: str,
) -> Response:
    """Resets all settings of how a model is served to their defaults. The model itself stays."""
    view = await _look(ray_api)

    async def forget(session: AsyncSession) -> dict[str, Any]:
        model = await models.find(session, settings, model_id)
        await checks.check_rights(session, settings, caller, model)
        await deployment_settings.choose(session, model.id, None)
        return deployment_object(await _status(session, settings, view, model), None)

    response = await idempotent.act(forget, changes=model_id)
    recent.forget()
    return response


@router.post("/{model_id:path}/warm", responses=answers(DeploymentDocument))
async def warm(idempotent: IdempotentPart, settings: SettingsPart, ray_api: RayApiPart, model_id: str) -> Response:
    """Starts to load a model, as a request for a completion does. Repeat this request until the model is loaded."""
    view = await _look(ray_api)

    async def ask(session: AsyncSession) -> dict[str, Any]:
        model = await models.find(session, settings, model_id)
        await deployments.use(session, (await engine_of(session, settings, model)).loaded)
        return deployment_object(await _status(session, settings, view, model), None)

    return await idempotent.act(ask, changes=model_id)


@router.post("/{model_id:path}/unload", responses=answers(DeploymentDocument))
async def unload(
    idempotent: IdempotentPart, settings: SettingsPart, caller: CallerPart, ray_api: RayApiPart, model_id: str
) -> Response:
    """Unloads a model that is answering no requests."""
    view = await _look(ray_api)

    async def remove(session: AsyncSession) -> dict[str, Any]:
        model = await models.find(session, settings, model_id)
        await checks.check_rights(session, settings, caller, model)
        await deployments.unload(session, settings, view.applications, model)
        return deployment_object(await _status(session, settings, view, model), None)

    return await idempotent.act(remove, changes=model_id)


async def _look(ray_api: RayApi) -> ServeView:
    try:
        return await ray_api.look()
    except httpx.HTTPError:
        message = (
            "The Ray cluster does not answer, so the state of models is not known. Nothing was changed; try again."
        )
        raise Unavailable(message, retry_after=5) from None


async def _status(session: AsyncSession, settings: Settings, view: ServeView, model: NamedModel) -> deployments.Status:
    return await deployments.status(session, settings, view.applications, model)


async def _with_load(ray_api: RayApi, status: deployments.Status) -> dict[str, Any]:
    load = await ray_api.load(status.application.app_name) if status.state == "running" else None
    return deployment_object(status, load)

"""/v1/models. Ids may hold slashes, raw or encoded."""

from typing import Any

import anyio.to_thread
from fastapi import APIRouter

from services import storage
from services.control_plane import deployments, models
from services.control_plane.objects import deleted, model_object
from services.control_plane.routes.dependencies import SettingsPart, StorePart

router = APIRouter(prefix="/models")


@router.get("")
async def list_models(store: StorePart, settings: SettingsPart) -> dict[str, Any]:
    async with store.begin() as session:
        found = await models.list_all(session, settings)
    return {"object": "list", "data": [model_object(model, settings) for model in found]}


@router.get("/{model_id:path}")
async def retrieve(store: StorePart, settings: SettingsPart, model_id: str) -> dict[str, Any]:
    async with store.begin() as session:
        return model_object(await models.find(session, settings, model_id), settings)


@router.delete("/{model_id:path}")
async def delete(store: StorePart, settings: SettingsPart, model_id: str) -> dict[str, Any]:
    """Stop offering and serving a trained policy, and remove its weights."""
    async with store.begin() as session:
        model = await models.remove(session, settings, model_id)
        await deployments.forget(session, model.app_name)
    await anyio.to_thread.run_sync(storage.delete, model.source)
    return deleted("model", model_id)

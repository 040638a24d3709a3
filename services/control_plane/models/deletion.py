"""Deletes trained models: from the lists, from Ray Serve, and from storage."""

from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.removal import remove_bytes
from services.control_plane.models import downloads, models
from services.control_plane.models.deployments import deployments
from services.control_plane.models.deployments import settings as deployment_settings
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings


async def delete(session: AsyncSession, settings: Settings, model_id: str) -> NamedModel:
    """Marks a trained model as deleted, and requests that Ray Serve unloads the model. Returns the model.

    Raises InvalidRequest if the model is still needed; the docstring of `models.remove` says by what. The caller must
    call `remove_files` after the commit.
    """
    model = await models.remove(session, settings, model_id)
    for app_name in (model.app_name, deployments.scorer_of(model)):
        await deployments.forget(session, app_name)
    await deployment_settings.choose(session, model.id, None)
    return model


async def remove_files(model: NamedModel, settings: Settings) -> None:
    """Deletes the files of a model from storage. If this fails, the regular cleanup deletes them later."""
    await remove_bytes(model.source)
    await remove_bytes(downloads.merged_folder(model, settings))

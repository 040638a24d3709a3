"""Reads and stores the settings of deployments (how models are served).

Settings come from the service's settings file, and from clients through the API. A trained model inherits the settings
of its base model, except the number of replicas and `pinned`.
"""

import logging
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from pydantic import ValidationError
from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.tables import Model, ModelSettings
from services.control_plane.settings import Settings
from services.deployment_settings import DeploymentSettings

log = logging.getLogger(__name__)

OWN = {"replicas", "pinned"}  # settings that a trained model does not inherit


async def of(
    session: AsyncSession, settings: Settings, model_ids: Collection[str], *, without_choice: bool = False
) -> dict[str, DeploymentSettings]:
    """Returns the deployment settings of the models with these ids, by id.

    If `without_choice` is true, ignores what clients chose for these models through the API. What they chose for the
    base models still counts, because trained models inherit it.
    """
    models = Model.__table__.c  # models of all projects
    trained = select(models.id, models.root).where(models.id.in_(model_ids))
    roots: dict[str, str] = dict((await session.execute(trained)).all())
    asked = {*model_ids, *roots.values()}
    query = select(ModelSettings.model_id, ModelSettings.values).where(ModelSettings.model_id.in_(asked))
    chosen: dict[str, dict[str, Any]] = dict((await session.execute(query)).all())
    chosen = {name: values for name, values in chosen.items() if not (without_choice and name in model_ids)}
    return {model_id: _of(model_id, roots.get(model_id), chosen, settings) for model_id in model_ids}


def _of(
    model_id: str, root: str | None, chosen: Mapping[str, dict[str, Any]], settings: Settings
) -> DeploymentSettings:
    base = settings.models.get(root or model_id)
    given = base.deployment.model_dump(exclude_unset=True) if base else {}
    if root is not None:
        given |= chosen.get(root, {})
        given = {name: value for name, value in given.items() if name not in OWN}
    return _readable(given | chosen.get(model_id, {}))


def _readable(values: Mapping[str, Any]) -> DeploymentSettings:
    """Returns `values`, the stored settings of how a model is served, as an object of the class DeploymentSettings.
    Leaves out fields and values that another release stored and this release does not know."""
    try:
        return DeploymentSettings.model_validate(values, extra="ignore")
    except ValidationError as error:
        unknown = {str(each["loc"][0]) for each in error.errors() if each["loc"]}
        if not unknown:
            raise
        _warn_once(f"Stored settings of a deployment have no effect, because this release refuses them: {error}")
        return _readable({name: value for name, value in values.items() if name not in unknown})


@lru_cache(maxsize=1000)
def _warn_once(message: str) -> None:
    """Logs the warning `message`, but only the first time that it is given. The stored settings that cause such a
    warning are read every second."""
    log.warning(message)


async def with_choice(
    session: AsyncSession, settings: Settings, model_id: str, chosen: DeploymentSettings
) -> DeploymentSettings:
    """Returns all deployment settings that the model would have if a client chose the settings `chosen`."""
    inherited = (await of(session, settings, [model_id], without_choice=True))[model_id]
    return DeploymentSettings.model_validate(
        inherited.model_dump(exclude_unset=True) | chosen.model_dump(exclude_unset=True)
    )


async def pinned(session: AsyncSession, settings: Settings) -> set[str]:
    """Returns the ids of the pinned models, which their settings keep loaded."""
    rows = await session.execute(select(ModelSettings.model_id, ModelSettings.values["pinned"].as_boolean()))
    chosen = {model_id: is_pinned for model_id, is_pinned in rows if is_pinned is not None}
    configured = {name: model.deployment.pinned for name, model in settings.models.items()}
    return {model_id for model_id, is_pinned in (configured | chosen).items() if is_pinned}


async def chosen(session: AsyncSession, model_id: str) -> dict[str, Any]:
    """Returns the settings that clients chose for the model through the API; {} if there are none."""
    query = select(ModelSettings.values).where(ModelSettings.model_id == model_id)
    return await session.scalar(query) or {}


async def choose(session: AsyncSession, model_id: str, values: Mapping[str, Any] | None) -> None:
    """Stores the settings `values` that a client chose for the model, in place of earlier ones.

    If `values` is None, deletes the earlier ones, so that the model has the defaults again.
    """
    await session.execute(delete(ModelSettings).where(ModelSettings.model_id == model_id))
    if values is not None:
        await session.execute(insert(ModelSettings).values(model_id=model_id, values=dict(values)))


async def use_gpus(session: AsyncSession, settings: Settings) -> bool:
    """Whether the settings of at least one model place the model on GPUs."""
    configured = (settings.num_gpus_of(model.deployment) for model in settings.models.values())
    if settings.num_gpus_per_model or any(configured):
        return True
    most = await session.scalars(select(ModelSettings.values["num_gpus"].as_float()))
    return any(most)

"""Checks the settings of a deployment (how a model is served) that a client sends.

Refuses settings that cannot work, and settings that the client may not choose.
"""

from collections.abc import Mapping

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.plan.positions import positions_of
from services.control_plane.auth.keys import Caller
from services.control_plane.core.errors import Forbidden, InvalidRequest
from services.control_plane.core.tables import DEFAULT_PROJECT
from services.control_plane.models import models
from services.control_plane.models.deployments import settings as deployment_settings
from services.control_plane.models.deployments.engines import engine_of
from services.control_plane.models.models import NamedModel
from services.control_plane.models.shapes import NoShapes, model_shapes
from services.control_plane.settings import Settings
from services.deployment_settings import DeploymentSettings

OF_REWARD_MODELS = {"replicas", "pinned", "idle_seconds", "dtype", "num_gpus", "max_model_len"}  # the rest are vLLM's


async def check_rights(session: AsyncSession, settings: Settings, caller: Caller, model: NamedModel) -> None:
    """Raises Forbidden unless the caller may change the model's deployment (how the model is served).

    Admins of the default project may change the deployments of base models. A project may change the deployments of its
    own trained models.
    """
    if model.job_id is not None:
        await models.find_own(session, settings, model.id)
    elif not (caller.manages_all and "admin" in caller.scopes):
        message = (
            f"The model '{model.id}' is a base model; only an admin key of the project {DEFAULT_PROJECT} may "
            "change its deployment."
        )
        raise Forbidden(message, param="model", code="insufficient_permissions")


async def check(
    session: AsyncSession,
    settings: Settings,
    caller: Caller,
    model: NamedModel,
    chosen: DeploymentSettings,
    capacity: Mapping[str, float],
) -> None:
    """Raises InvalidRequest if the deployment settings `chosen` cannot work for the model, or exceed the limits of a
    project.

    The error names the field, the limit and the remedy. `capacity` holds the numbers of CPUs and GPUs that the cluster
    has or may grow to; {} means that they are unknown.
    """
    if model.num_outputs:
        _check_reward_model(model, chosen)
    full = await deployment_settings.with_choice(session, settings, model.id, chosen)
    num_gpus = settings.num_gpus_of(full)
    if trouble := full.trouble(num_gpus=num_gpus, dtype=settings.dtype_of(full)):
        raise _invalid(trouble[0], f"{trouble[1]}.")
    if not caller.manages_all:
        _check_limits(settings, chosen, num_gpus)
    _check_capacity(chosen, num_gpus, capacity)
    if chosen.pinned:
        await _check_pinned(session, settings, model)
    if full.mode != "merged":
        await _check_attached(session, settings, model, chosen)
    if chosen.max_model_len is not None:
        await _check_length(model, chosen.max_model_len)


def _invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=field)


def _check_reward_model(model: NamedModel, chosen: DeploymentSettings) -> None:
    for field in sorted(chosen.model_fields_set - OF_REWARD_MODELS):
        what = f"'{field}' is a setting of vLLM, but the model '{model.id}' is a reward model, which runs without vLLM"
        raise _invalid(field, f"{what}; leave '{field}' out.")
    if (chosen.num_gpus or 0) > 1:
        message = (
            f"num_gpus is {chosen.num_gpus:g}, but a reward model cannot be split over several GPUs; choose at most 1."
        )
        raise _invalid("num_gpus", message)
    if chosen.dtype == "float16":
        raise _invalid("dtype", "Reward models do not support the dtype 'float16'; choose 'bfloat16' or 'float32'.")


def _check_limits(settings: Settings, chosen: DeploymentSettings, num_gpus: float) -> None:
    limits, most = settings.project_deployments, chosen.replicas.max
    ask = f"an admin of {DEFAULT_PROJECT} may set more, or raise project_deployments in the settings."
    if most > limits.max_replicas:
        what = f"'replicas' is {most}, but a project may have at most {limits.max_replicas} replicas of a model"
        raise _invalid("replicas", f"{what}; {ask}")
    if (gpus := num_gpus * most) > limits.max_gpus and gpus > settings.num_gpus_per_model:
        message = (
            f"num_gpus of all replicas is {gpus:g}, but a project may use at most {limits.max_gpus:g} GPUs for "
            f"a model; {ask}"
        )
        raise _invalid("num_gpus", message)
    if chosen.pinned and not limits.pinned:
        raise _invalid("pinned", f"'pinned' is true, but projects may not pin models (keep them loaded); {ask}")


def _check_capacity(chosen: DeploymentSettings, num_gpus: float, capacity: Mapping[str, float]) -> None:
    if not capacity:
        return
    most = chosen.replicas.max
    needs = {"GPU": ("num_gpus", num_gpus * most), "CPU": ("replicas", float(most))}
    for kind, (field, amount) in needs.items():
        if amount > (limit := capacity.get(kind, 0.0)):
            message = f"{most} replicas need {amount:g} {kind}s, and the cluster has, or may grow to, {limit:g}"
            raise _invalid(
                field, f"{message}; choose fewer replicas or GPUs, or add nodes (max_cluster in the settings)."
            )


async def _check_pinned(session: AsyncSession, settings: Settings, model: NamedModel) -> None:
    others = await deployment_settings.pinned(session, settings) - {model.id}
    if len(others) >= settings.most_pinned:
        most = f"at most {settings.most_pinned} can be pinned, one fewer than max_loaded_models"
        message = f"'pinned' is true, but {len(others)} other models are pinned (always loaded), and {most}"
        remedy = "set 'pinned' of one of them to false, or raise max_loaded_models in the settings"
        raise _invalid("pinned", f"{message}; {remedy}.")


async def _check_attached(
    session: AsyncSession, settings: Settings, model: NamedModel, chosen: DeploymentSettings
) -> None:
    """Raises InvalidRequest if `chosen` sets another field than `mode`, but the model has no engine (server) of its
    own.

    A model has no engine of its own if it is an adapter for which the engine of its base model answers. The settings of
    this engine are those of the base model.
    """
    engine, fields = await engine_of(session, settings, model), sorted(chosen.model_fields_set - {"mode"})
    if engine.adapter and fields:
        base = engine.loaded.id
        message = (
            f"'{fields[0]}' is set, but the engine of '{base}' runs the adapter '{model.id}' with the settings of "
            f"'{base}'"
        )
        raise _invalid(fields[0], f"{message}; set 'mode' to 'merged' as well, or set '{fields[0]}' of '{base}'.")


async def _check_length(model: NamedModel, max_model_len: int) -> None:
    try:
        config = (await model_shapes(model)).config
    except NoShapes:
        return  # the engine will say so if it is too long
    limit = positions_of(config)
    if limit is not None and max_model_len > limit:
        message = (
            f"max_model_len is {max_model_len}, but the model '{model.id}' takes at most {limit} tokens; choose "
            f"at most {limit}."
        )
        raise _invalid("max_model_len", message)

"""Finds the engine (the server of a model on Ray Serve) that answers requests for a model.

For most models, this is the model's own engine. An engine can also attach adapters of its model, which means that it
loads the adapters beside the model and answers for them, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.config import Lora, Quantization
from services.contract import ADAPTER_HEADER, ADAPTER_SOURCE_HEADER, Adapter, Weights
from services.control_plane.core.tables import Model
from services.control_plane.models.deployments import settings as deployment_settings
from services.control_plane.models.models import NamedModel, base_of, trained
from services.control_plane.settings import Settings
from services.deployment_settings import DeploymentSettings, Mode


@dataclass(frozen=True)
class Engine:
    """The engine (model server on Ray Serve) that answers requests for a model.

    The model may be an adapter that this engine has loaded beside its own model.
    """

    id: str  # of the model that the client named
    loaded: NamedModel  # the model that the engine loads: the named model, or its base
    adapter: Adapter | None = None  # the named model, if the engine attaches it to its base
    why_merged: str | None = None  # why an adapter has an engine of its own

    @property
    def app_name(self) -> str:
        return self.loaded.app_name

    @property
    def headers(self) -> dict[str, str]:
        """Returns the HTTP headers that tell the engine (model server) for which adapter a request is. Returns {} if
        the request is not for an attached adapter.

        An attached adapter is one for which the engine of its base model answers.
        """
        if self.adapter is None:
            return {}
        return {ADAPTER_HEADER: quote(self.adapter.id), ADAPTER_SOURCE_HEADER: quote(self.adapter.source)}


async def engine_of(session: AsyncSession, settings: Settings, model: NamedModel) -> Engine:
    """Returns the engine (the model server) that answers requests for the model.

    For an adapter that the engine of its base model can attach, this is the base model's engine. For any other model,
    it is the model's own engine.
    """
    if model.adapter is None or model.base_source is None or model.num_outputs:
        return Engine(model.id, model)
    base = await base_of(session, settings, model)
    own = await deployment_settings.of(session, settings, {model.id, base.id})
    if why := why_merged(
        model.adapter, model.quantization, own[model.id].mode, own[base.id], on_experts=model.on_experts
    ):
        return Engine(model.id, model, why_merged=why)
    return Engine(model.id, base, Adapter(id=model.id, source=model.source))


async def engines_of(session: AsyncSession, settings: Settings, wanted: Mapping[str, NamedModel]) -> dict[str, Engine]:
    """Returns the engines (model servers) that compute the log-probabilities of the reference models of jobs, by model
    id.

    `wanted` holds the reference models by id, with only the values that a job stores about them: the id and the source.
    The other values are read from the table of models.
    """
    rows = await session.scalars(select(Model).where(Model.id.in_(list(wanted))))
    models = {**wanted, **{row.id: trained(row) for row in rows}}
    return {model_id: await engine_of(session, settings, model) for model_id, model in models.items()}


async def hosts_of(session: AsyncSession, settings: Settings, model: NamedModel) -> list[NamedModel]:
    """Returns the models whose engines (model servers) can answer for the model: the model itself and, for an adapter,
    its base.

    The base is read from the database, so only the id and the source of `model` need be set.
    """
    row = await session.scalar(select(Model).where(Model.id == model.id))
    if row is None or row.base_source is None:
        return [model]
    return [model, await base_of(session, settings, trained(row))]


async def why_merged_on(session: AsyncSession, settings: Settings, start: NamedModel, weights: Weights) -> str | None:
    """Returns the reason why the engine (model server) of a job's base model could not answer for the adapter that the
    job trains.

    Returns None if this engine could answer for the adapter, or if the job trains no adapter. `start` is the model that
    the job starts from, and `weights` says what the job trains.
    """
    if weights.adapter is None:
        return None
    base = start.root if start.adapter else start.id
    own = (await deployment_settings.of(session, settings, {base}))[base]
    # The policy inherits the mode.
    return why_merged(weights.adapter, weights.quantization, own.mode, own, on_experts=weights.on_experts)


def why_merged(
    adapter: Lora,
    quantization: Quantization | None,
    mode: Mode,
    base: DeploymentSettings,
    *,
    on_experts: bool = False,
) -> str | None:
    """Returns the reason why an adapter must be merged into its base model and have an engine (a model server) of its
    own.

    Returns None if the engine of the base model can answer for the adapter as well. `quantization` is that of the base
    model during training, None for none. `mode` is a setting of the adapter's deployment, which can ask for the merge
    (`merged`), and `base` holds the settings of the base model's deployment. `on_experts` says whether the adapter is
    on the experts of a mixture of experts.
    """
    if mode == "merged":
        return "the mode of its deployment is 'merged'"
    if not base.max_lora_rank:
        return "its base model takes no adapters (max_lora_rank 0)"
    if adapter.r > base.max_lora_rank:
        return f"its rank is {adapter.r}, but its base model takes at most {base.max_lora_rank} (max_lora_rank)"
    if adapter.use_dora:
        return "it uses DoRA"
    if on_experts:
        return "it is on the experts of a mixture of experts"
    if quantization:
        return f"its base model is in {quantization.upper()}"
    return None

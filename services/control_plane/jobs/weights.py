"""Decides for a new job whether it trains all weights or an adapter, on which layers, and in which precision."""

from dpo_core.config import Lora
from dpo_core.plan.adapters import adapts_experts
from services.contract import Precision, Weights
from services.control_plane.jobs.combinations import Asked
from services.control_plane.models.models import NamedModel
from services.control_plane.models.shapes import NoShapes, model_shapes
from services.control_plane.settings import Settings


def decide(asked: Asked, start: NamedModel, settings: Settings) -> Weights:
    """Returns which weights a new job trains (all, or an adapter's), in which precision, and how the base model is
    quantized.

    `asked` holds the user's choices; for `auto`, the service chooses. `start` is the model that the job starts from.
    """
    adapter = _adapter(asked, start, settings)
    kept = start.quantization if adapter else None  # a trained adapter keeps the quantization of its base
    quantization = asked.quantization or kept
    return Weights(adapter=adapter, precision=_precision(asked, settings), quantization=quantization)


def _adapter(asked: Asked, start: NamedModel, settings: Settings) -> Lora | None:
    if asked.adapter == "none":
        return None
    if start.adapter is not None:
        return start.adapter
    if isinstance(asked.adapter, Lora):
        return asked.adapter
    base = settings.models.get(start.root)
    default = base.adapter if base else Lora()
    return None if default == "none" else default


def _precision(asked: Asked, settings: Settings) -> Precision:
    if asked.precision != "auto":
        return asked.precision
    return "bfloat16" if settings.num_gpus_per_worker else "float32"


async def placed(weights: Weights, start: NamedModel) -> Weights:
    """Returns the weights with the field `on_experts`: whether their adapter is on the experts of a mixture of experts.

    `start` is the model that the job starts from. If the shapes of its base model's weights cannot be read on this
    machine, the field is that of `start`.
    """
    adapter = weights.adapter
    if adapter is None:
        return weights
    targets = None if adapter.target_modules == "all-linear" else adapter.target_modules
    try:
        on_experts = adapts_experts(await model_shapes(start), targets)
    except NoShapes:
        on_experts = start.on_experts
    return weights.model_copy(update={"on_experts": on_experts})


def in_words(weights: Weights, start: NamedModel, reference: NamedModel | None) -> str:
    """Returns the text of an event that says which weights the job trains and which model is its reference.

    `start` is the model that the job starts from. `reference` is the job's reference model, None if the job's objective
    (training method) uses none.
    """
    adapter, precision = weights.adapter, weights.precision
    over = f", on a base quantized to {weights.quantization.upper()}" if weights.quantization else ""
    if adapter is None:
        merged = " (its adapter is merged into the base first)" if start.adapter else ""
        what = f"Training all weights of {start.id}{merged} in {precision}{over}"
    elif start.adapter:
        what = f"Training the adapter of {start.id}, of rank {adapter.r}, further in {precision}{over}"
    else:
        targets = adapter.target_modules
        where = "all linear layers" if targets == "all-linear" else ", ".join(targets)
        what = f"Training a new adapter of rank {adapter.r} on {where} of {start.id} in {precision}{over}"
    if reference is None:
        return what
    own = " as it is before the first step" if reference.source == start.source else ""
    return f"{what}; the reference model is {reference.id}{own}"

"""Decides which weights a job trains, in which precision, and against which reference."""

from dataclasses import dataclass
from typing import Literal

from dpo_core.config import Lora
from services.contract import JobSpec, Precision, Weights
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings


@dataclass(frozen=True)
class WeightsAsked:
    """What a request says of the weights; `auto` leaves it to the service."""

    adapter: Lora | Literal["none", "auto"] = "auto"
    precision: Precision | Literal["auto"] = "auto"


def decide(asked: WeightsAsked, start: NamedModel, settings: Settings) -> Weights:
    """Raises InvalidRequest for an adapter on top of another one."""
    return Weights(adapter=_adapter(asked, start, settings), precision=_precision(asked, settings))


def _adapter(asked: WeightsAsked, start: NamedModel, settings: Settings) -> Lora | None:
    if asked.adapter == "none":
        return None
    if start.adapter is not None:
        if asked.adapter not in ("auto", start.adapter):
            message = (
                f"'{start.id}' is an adapter of rank {start.adapter.r}, which the job trains on with the options that "
                "it has. Leave x_raydpo.adapter out, or send 'none' to merge it into its base and train all weights."
            )
            raise InvalidRequest(message, param="x_raydpo.adapter")
        return start.adapter
    if isinstance(asked.adapter, Lora):
        return asked.adapter
    base = settings.models.get(start.root)
    default = base.adapter if base else Lora()
    return None if default == "none" else default


def _precision(asked: WeightsAsked, settings: Settings) -> Precision:
    if asked.precision != "auto":
        return asked.precision
    return "bfloat16" if settings.num_gpus_per_worker else "float32"


def check_reference(spec: JobSpec, reference: NamedModel) -> None:
    """Raises InvalidRequest for a reference that the job cannot be compared with."""
    objective = spec.config.objective
    if not objective.traits.needs_reference:
        message = f"{objective.type} has no reference; leave x_raydpo.reference.model out."
        raise InvalidRequest(message, param="x_raydpo.reference.model")
    if reference.num_outputs:
        message = f"'{reference.id}' is a reward model, which says nothing of tokens; name a policy or a base model."
        raise InvalidRequest(message, param="x_raydpo.reference.model")


def check_start(spec: JobSpec, start: NamedModel) -> None:
    """Raises InvalidRequest for a model of another kind than the objective trains."""
    wanted = spec.config.objective.traits.num_outputs
    if start.num_outputs in (0, wanted):
        return
    objective = spec.config.objective.type
    trains = f"a reward model of {wanted} output(s)" if wanted else "a policy"
    message = (
        f"'{start.id}' is a reward model of {start.num_outputs} output(s), and {objective} trains {trains}; "
        "start from its base model."
    )
    raise InvalidRequest(message, param="model")


def in_words(weights: Weights, start: NamedModel, reference: NamedModel | None) -> str:
    """For an event: what is trained, and what it is compared with. `reference` None: the objective has none."""
    adapter, precision = weights.adapter, weights.precision
    if adapter is None:
        merged = ", the adapter merged into its base" if start.adapter else ""
        what = f"Training all weights of {start.id}{merged} in {precision}"
    elif start.adapter:
        what = f"Training on with the adapter {start.id} of rank {adapter.r} in {precision}"
    else:
        targets = adapter.target_modules
        where = "all linear layers" if targets == "all-linear" else ", ".join(targets)
        what = f"Training an adapter of rank {adapter.r} on {where} of {start.id} in {precision}"
    if reference is None:
        return what
    own = ", as it is before the first step" if reference.source == start.source else ""
    return f"{what}; the reference is {reference.id}{own}"

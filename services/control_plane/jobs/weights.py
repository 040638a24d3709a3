"""Decides which weights a job trains and in which precision, and refuses combinations that do not go together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dpo_core.config import Lora, Quantization
from services.contract import JobSpec, Precision, Weights
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings


@dataclass(frozen=True)
class WeightsAsked:
    """The options of a request for the weights to train. The value `auto` leaves the choice to the service."""

    adapter: Lora | Literal["none", "auto"] = "auto"
    precision: Precision | Literal["auto"] = "auto"
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Combination:
    """The parts of a request that must go together. `reference` is None if the objective has no reference model."""

    spec: JobSpec  # with the decided weights
    asked: WeightsAsked
    start: NamedModel
    reference: NamedModel | None

    @property
    def objective(self) -> str:
        return self.spec.config.objective.type

    @property
    def num_outputs(self) -> int:
        """Returns the number of outputs of the reward model that the objective trains; 0 if it trains a policy."""
        return self.spec.config.objective.traits.num_outputs

    @property
    def quantized(self) -> bool:
        return self.spec.weights.quantization is not None


class Rule(NamedTuple):
    """A rule that forbids a combination of options. The documents print `what` and `remedy`."""

    param: str
    what: str
    remedy: str
    is_broken: Callable[[Combination], bool]


RULES = (
    Rule(
        "model",
        "a start that is a reward model, for an objective that trains a policy or a reward model with other outputs",
        "start from its base model",
        lambda given: given.start.num_outputs not in (0, given.num_outputs),
    ),
    Rule(
        "x_raydpo.adapter",
        "a new adapter on a start that is an adapter itself",
        "leave it out to train on with that adapter, or send 'none' to merge it into its base and train all weights",
        lambda given: (
            given.start.adapter is not None and given.asked.adapter not in ("none", "auto", given.start.adapter)
        ),
    ),
    Rule(
        "x_raydpo.reference.model",
        "a reference for an objective that has none",
        "leave it out, or choose an objective that has a reference",
        lambda given: given.spec.reference_model is not None and given.reference is None,
    ),
    Rule(
        "x_raydpo.reference.model",
        "a reward model as the reference",
        "name a policy or a base model, because a reward model gives tokens no probabilities",
        lambda given: given.reference is not None and bool(given.reference.num_outputs),
    ),
    Rule(
        "x_raydpo.quantization",
        "a quantized base without an adapter",
        "leave it out, or train an adapter: weights in NF4 are frozen",
        lambda given: given.quantized and given.spec.weights.adapter is None,
    ),
    Rule(
        "x_raydpo.sharding",
        "a quantized base that workers split",
        "send 'replicated' or leave it out, or leave x_raydpo.quantization out",
        lambda given: given.quantized and given.spec.config.sharding in ("full", "hybrid"),
    ),
    Rule(
        "x_raydpo.reference.source",
        "'serve' for a policy with a quantized base",
        "send 'trainer' or leave it out: an engine would score with the base as it was before",
        lambda given: given.quantized and given.spec.reference_source == "serve",
    ),
)


def check(given: Combination) -> None:
    """Raises InvalidRequest for the first rule that the request breaks."""
    for rule in RULES:
        if rule.is_broken(given):
            names = f"model '{given.start.id}', objective {given.objective}"
            raise InvalidRequest(f"A job cannot have {rule.what} ({names}); {rule.remedy}.", param=rule.param)


def decide(asked: WeightsAsked, start: NamedModel, settings: Settings) -> Weights:
    """Returns the weights that the job trains: the request's choices, and the service's for options left at `auto`."""
    adapter = _adapter(asked, start, settings)
    kept = start.quantization if adapter else None  # an adapter goes on with the base that it was trained on
    quantization = asked.quantization or kept
    return Weights(adapter=adapter, precision=_precision(asked, settings), quantization=quantization)


def _adapter(asked: WeightsAsked, start: NamedModel, settings: Settings) -> Lora | None:
    if asked.adapter == "none":
        return None
    if start.adapter is not None:
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


def in_words(weights: Weights, start: NamedModel, reference: NamedModel | None) -> str:
    """Returns the text of an event that says which weights the job trains and which model is its reference.

    `reference` is None if the objective has no reference model.
    """
    adapter, precision = weights.adapter, weights.precision
    over = f", on a base in {weights.quantization.upper()}" if weights.quantization else ""
    if adapter is None:
        merged = ", the adapter merged into its base," if start.adapter else ""
        what = f"Training all weights of {start.id}{merged} in {precision}{over}"
    elif start.adapter:
        what = f"Training on with the adapter {start.id} of rank {adapter.r} in {precision}{over}"
    else:
        targets = adapter.target_modules
        where = "all linear layers" if targets == "all-linear" else ", ".join(targets)
        what = f"Training an adapter of rank {adapter.r} on {where} of {start.id} in {precision}{over}"
    if reference is None:
        return what
    own = ", as it is before the first step" if reference.source == start.source else ""
    return f"{what}; the reference is {reference.id}{own}"

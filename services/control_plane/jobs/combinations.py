"""Refuses jobs whose options do not go together. `RULES` holds every such combination; the documents print it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dpo_core.config import Lora, Quantization
from services.contract import JobSpec, Precision
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.models.models import NamedModel


@dataclass(frozen=True)
class Asked:
    """The options of a request that leave a choice to the service. The value `auto` means that the service chooses."""

    adapter: Lora | Literal["none", "auto"] = "auto"
    precision: Precision | Literal["auto"] = "auto"
    quantization: Quantization | None = None
    comparing: frozenset[str] = field(default_factory=frozenset)  # given fields of x_raydpo that compare checkpoints


@dataclass(frozen=True)
class Combination:
    """The parts of a request that must go together. `reference` is None if the objective has no reference model."""

    spec: JobSpec  # with the decided weights
    asked: Asked
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

    def compares(self, name: str) -> bool:
        """Whether the request gives the field `name`, which compares checkpoints, to a job that evaluates none."""
        return name in self.asked.comparing and not self.spec.validates


class Rule(NamedTuple):
    """A rule that forbids a combination of options. The documents print `what` and `remedy`."""

    param: str
    what: str
    remedy: str
    is_broken: Callable[[Combination], bool]


VALIDATE = "send a validation_file, or hold rows out with x_raydpo.validation_share; or leave it out"
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
        "x_raydpo.adapter",
        "'none' for a reward model that starts from a policy's adapter",
        "leave it out to train on with that adapter, or start from its base model",
        lambda given: (
            given.spec.weights.adapter is None
            and given.start.adapter is not None
            and given.start.num_outputs < given.num_outputs
        ),
    ),
    Rule(
        "x_raydpo.reference.model",
        "a reference for an objective that has none",
        "leave it out, or choose an objective that has a reference",
        lambda given: given.spec.reference_model is not None and given.reference is None,
    ),
    Rule(
        "x_raydpo.reference.source",
        "a source of the reference's scores for an objective that has no reference",
        "leave it out, or choose an objective that has a reference",
        lambda given: given.spec.reference_source != "auto" and given.reference is None,
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
    Rule(
        "x_raydpo.validation_share",
        "both a validation_file and rows of the training file to evaluate checkpoints on",
        "send one of them",
        lambda given: bool(given.spec.validation_file and given.spec.validation_share),
    ),
    Rule(
        "x_raydpo.best_metric",
        "a metric that compares checkpoints, without rows to evaluate them on",
        VALIDATE,
        lambda given: given.compares("best_metric"),
    ),
    Rule(
        "x_raydpo.early_stop",
        "an early stop, without rows to evaluate checkpoints on",
        VALIDATE,
        lambda given: given.compares("early_stop"),
    ),
    Rule(
        "x_raydpo.policy",
        "the best checkpoint as the policy, without rows to evaluate checkpoints on",
        VALIDATE,
        lambda given: given.compares("policy"),
    ),
)


def check(given: Combination) -> None:
    """Raises InvalidRequest for the first rule that the request breaks."""
    for rule in RULES:
        if rule.is_broken(given):
            names = f"model '{given.start.id}', objective {given.objective}"
            raise InvalidRequest(f"A job cannot have {rule.what} ({names}); {rule.remedy}.", param=rule.param)

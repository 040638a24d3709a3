"""Refuses jobs whose options exclude each other.

`RULES` lists all forbidden combinations. The page docs/use/combinations.md prints this list.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dpo_core.config import Lora, Quantization
from services.contract import JobSpec, Precision
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.models.models import NamedModel


@dataclass(frozen=True)
class Asked:
    """The options of a job request for which the service may choose the value, as the user sent them. The value `auto`
    lets the service choose.

    Also holds, as `comparing`, the names of those fields in the request that compare checkpoints on validation data,
    such as `best_metric`.
    """

    adapter: Lora | Literal["none", "auto"] = "auto"
    precision: Precision | Literal["auto"] = "auto"
    quantization: Quantization | None = None
    max_length: object = "auto"
    comparing: frozenset[str] = field(default_factory=frozenset)  # fields in the request that compare checkpoints


@dataclass(frozen=True)
class Combination:
    """A job request and its choices, which the rules about forbidden combinations of options look at: the job's spec
    (complete description), the options that the user sent, the model that the job starts from, and its reference model.
    """

    spec: JobSpec  # with the service's choice of weights
    asked: Asked
    start: NamedModel  # the model that the job starts from
    reference: NamedModel | None  # None if the objective (training method) uses no reference model

    @property
    def objective(self) -> str:
        return self.spec.config.objective.type

    @property
    def num_outputs(self) -> int:
        """Returns the number of outputs of the reward model that the job trains. Returns 0 if the job trains a
        policy."""
        return self.spec.config.objective.traits.num_outputs

    @property
    def quantized(self) -> bool:
        return self.spec.weights.quantization is not None

    @property
    def adapter_on_experts(self) -> Lora | None:
        """Returns the options of the adapter that the job trains, if the adapter is on the experts of a mixture of
        experts. Otherwise returns None."""
        return self.spec.weights.adapter if self.spec.weights.on_experts else None

    def compares(self, name: str) -> bool:
        """Whether the request sets the field `name`, such as `best_metric`, which compares checkpoints on validation
        data, but the job has no such data.
        """
        return name in self.asked.comparing and not self.spec.validates


class Rule(NamedTuple):
    """A rule that forbids a combination of options.

    `what` describes the combination, and `remedy` says what the user should do. Error messages and the documents print
    these two texts.
    """

    param: str  # the field of the request that the error names
    what: str
    remedy: str
    is_broken: Callable[[Combination], bool]


OUTSIDE = "or send target_modules outside the experts, such as q_proj, k_proj, v_proj and o_proj"
VALIDATE = "send a validation_file or x_raydpo.validation_share as well, or leave the field out"
RULES = (
    Rule(
        "model",
        "a reward model in the field 'model' if the method trains a policy or a reward model with another number of "
        "outputs",
        "name the base model that the reward model was trained from",
        lambda given: given.start.num_outputs not in (0, given.num_outputs),
    ),
    Rule(
        "x_raydpo.adapter",
        "a new adapter if the field 'model' names a policy with an adapter",
        "leave x_raydpo.adapter out to go on with the policy's adapter, or send 'none' to merge that adapter into its "
        "base and train all weights",
        lambda given: (
            given.start.adapter is not None and given.asked.adapter not in ("none", "auto", given.start.adapter)
        ),
    ),
    Rule(
        "x_raydpo.adapter",
        "x_raydpo.adapter 'none' if a reward model is trained from a policy with an adapter",
        "leave x_raydpo.adapter out to go on with the policy's adapter, or name the policy's base model",
        lambda given: (
            given.spec.weights.adapter is None
            and given.start.adapter is not None
            and given.start.num_outputs < given.num_outputs
        ),
    ),
    Rule(
        "x_raydpo.adapter.dropout",
        "dropout in an adapter on the experts of a mixture of experts",
        f"send 0 as x_raydpo.adapter.dropout, {OUTSIDE}",
        lambda given: given.adapter_on_experts is not None and given.adapter_on_experts.dropout > 0,
    ),
    Rule(
        "x_raydpo.adapter.use_dora",
        "DoRA on the experts of a mixture of experts",
        f"send false as x_raydpo.adapter.use_dora, {OUTSIDE}",
        lambda given: given.adapter_on_experts is not None and given.adapter_on_experts.use_dora,
    ),
    Rule(
        "x_raydpo.reference.model",
        "a reference model if the method uses none",
        "leave x_raydpo.reference.model out, or choose a method that uses a reference model",
        lambda given: given.spec.reference_model is not None and given.reference is None,
    ),
    Rule(
        "x_raydpo.reference.source",
        "a source of the reference model's scores if the method uses no reference model",
        "leave x_raydpo.reference.source out, or choose a method that uses a reference model",
        lambda given: given.spec.reference_source != "auto" and given.reference is None,
    ),
    Rule(
        "x_raydpo.reference.model",
        "a reward model as its reference model",
        "name a policy or a base model, because a reward model does not give probabilities of tokens",
        lambda given: given.reference is not None and bool(given.reference.num_outputs),
    ),
    Rule(
        "x_raydpo.quantization",
        "a quantized base model without an adapter",
        "leave x_raydpo.quantization out, or train an adapter, because quantized weights cannot be trained",
        lambda given: given.quantized and given.spec.weights.adapter is None,
    ),
    Rule(
        "x_raydpo.sharding",
        "a quantized base model that is split over workers",
        "send 'replicated' as x_raydpo.sharding, or leave x_raydpo.quantization out",
        lambda given: given.quantized and given.spec.config.sharding in ("full", "hybrid"),
    ),
    Rule(
        "x_raydpo.reference.source",
        "a reference model that vLLM serves if the base model is quantized",
        "send 'trainer' as x_raydpo.reference.source or leave it out, "
        "because vLLM would score with the unquantized base",
        lambda given: given.quantized and given.spec.reference_source == "serve",
    ),
    Rule(
        "x_raydpo.validation_share",
        "both a validation_file and an x_raydpo.validation_share",
        "send only one of the two",
        lambda given: bool(given.spec.validation_file and given.spec.validation_share),
    ),
    Rule(
        "x_raydpo.best_metric",
        "x_raydpo.best_metric without data on which checkpoints are evaluated",
        VALIDATE,
        lambda given: given.compares("best_metric"),
    ),
    Rule(
        "x_raydpo.early_stop",
        "x_raydpo.early_stop without data on which checkpoints are evaluated",
        VALIDATE,
        lambda given: given.compares("early_stop"),
    ),
    Rule(
        "x_raydpo.policy",
        "x_raydpo.policy 'best' without data on which checkpoints are evaluated",
        VALIDATE,
        lambda given: given.compares("policy"),
    ),
)


def check(given: Combination) -> None:
    """Raises InvalidRequest if the job request `given` has a combination of options that one of `RULES` forbids. The
    error describes the first such rule."""
    for rule in RULES:
        if rule.is_broken(given):
            names = f"the model is '{given.start.id}', the method '{given.objective}'"
            raise InvalidRequest(f"A job cannot have {rule.what} ({names}); {rule.remedy}.", param=rule.param)

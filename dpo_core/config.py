"""What a training run is: frozen dataclasses that check themselves. Standard library only.

These very classes are the fields of a job and the body of a request: pydantic reads
`__pydantic_config__` and refuses unknown keys, `__post_init__` refuses values out of range.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

REFUSE_UNKNOWN_KEYS = {"extra": "forbid"}


class InvalidOption(ValueError):
    """A value that training cannot use. `field` is the option's name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _check(valid: bool, field: str, value: object, limit: str) -> None:
    if not valid:
        raise InvalidOption(field, f"{field} is {value}; it must be {limit}.")


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Negative log-likelihood of the completion, a mean over the tokens of the global batch."""

    __pydantic_config__: ClassVar = REFUSE_UNKNOWN_KEYS
    learns_from: ClassVar = "demonstrations"
    needs_reference: ClassVar = False
    default_learning_rate: ClassVar = 2e-5
    default_epochs: ClassVar = 3
    type: Literal["supervised"] = "supervised"


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """Direct Preference Optimization, arXiv 2305.18290, equation 7."""

    __pydantic_config__: ClassVar = REFUSE_UNKNOWN_KEYS
    learns_from: ClassVar = "pairs"
    needs_reference: ClassVar = True
    default_learning_rate: ClassVar = 1e-6
    default_epochs: ClassVar = 1
    type: Literal["dpo"] = "dpo"
    beta: float = 0.1  # strength of the anchor: higher stays closer to the reference

    def __post_init__(self) -> None:
        _check(0 < self.beta <= 2, "beta", self.beta, "greater than 0 and at most 2")


Objective = Supervised | Dpo
OBJECTIVES: dict[str, type[Objective]] = {"supervised": Supervised, "dpo": Dpo}


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its schedule."""

    __pydantic_config__: ClassVar = REFUSE_UNKNOWN_KEYS
    learning_rate: float | None = None  # None: the objective's default
    learning_rate_multiplier: float | None = None  # of the objective's default
    warmup_ratio: float = 0.1  # share of all steps
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        rate, multiplier = self.learning_rate, self.learning_rate_multiplier
        if rate is not None and multiplier is not None:
            raise InvalidOption(
                "learning_rate_multiplier",
                "learning_rate and learning_rate_multiplier exclude each other; send one.",
            )
        _check(rate is None or 0 < rate <= 1, "learning_rate", rate, "greater than 0 and at most 1")
        _check(
            multiplier is None or 0 < multiplier < float("inf"),
            "learning_rate_multiplier",
            multiplier,
            "greater than 0 and finite",
        )
        _check(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "in [0, 1)")
        _check(0 <= self.weight_decay <= 1, "weight_decay", self.weight_decay, "in [0, 1]")
        _check(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "greater than 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. `None` means: decided by `resolved` once the data is known."""

    __pydantic_config__: ClassVar = REFUSE_UNKNOWN_KEYS
    objective: Objective = field(default_factory=Dpo)
    optim: Optim = field(default_factory=Optim)
    n_epochs: int | None = None
    batch_size: int | None = None  # groups per optimizer step, over all ranks
    max_length: int = 2048  # tokens of a prompt and one completion; longer groups are dropped and counted
    max_tokens_per_pack: int = 8192  # tokens of one forward and backward on one rank
    checkpoint_steps: int | None = None  # steps between checkpoints; None: about four in a run
    seed: int = 0

    def __post_init__(self) -> None:
        epochs, batch, every = self.n_epochs, self.batch_size, self.checkpoint_steps
        _check(epochs is None or 1 <= epochs <= 50, "n_epochs", epochs, "from 1 to 50")
        _check(batch is None or 1 <= batch <= 256, "batch_size", batch, "from 1 to 256")
        _check(every is None or every >= 1, "checkpoint_steps", every, "at least 1")
        _check(2 <= self.max_length <= 1_048_576, "max_length", self.max_length, "from 2 to 1048576")
        _check(
            self.max_tokens_per_pack >= self.max_length,
            "max_tokens_per_pack",
            self.max_tokens_per_pack,
            f"at least max_length, {self.max_length}",
        )
        _check(0 <= self.seed < 2**31, "seed", self.seed, "from 0 to 2147483647")

    def resolved(self, num_groups: int) -> "TrainConfig":
        """This run with every `None` decided for `num_groups` rows of data."""
        batch = min(self.batch_size or max(8, min(64, num_groups // 50)), num_groups)
        epochs = self.n_epochs or self.objective.default_epochs
        default_rate = self.objective.default_learning_rate * (self.optim.learning_rate_multiplier or 1)
        rate = self.optim.learning_rate or default_rate
        every = self.checkpoint_steps or max(1, -(-epochs * -(-num_groups // batch) // 4))
        optim = replace(self.optim, learning_rate=rate, learning_rate_multiplier=None)
        return replace(self, optim=optim, n_epochs=epochs, batch_size=batch, checkpoint_steps=every)

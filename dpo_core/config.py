"""Defines the options of a training run as frozen dataclasses that check their values. Uses only the standard library.

The same classes are fields of a job and of a request's body: pydantic refuses unknown keys, and `__post_init__` refuses
values out of range.
"""

from dataclasses import field, replace
from typing import Annotated, Literal

from dpo_core.options import LOSS, Dpo, InvalidOption, Limit, Metric, NotNegative, Objective, Positive, check, options


@options
class Optim:
    """The options of AdamW and of the schedule of its learning rate."""

    # None means the objective's default
    learning_rate: Annotated[float | None, Limit("greater than 0 and at most 1", lambda x: 0 < x <= 1)] = None
    # a factor of the objective's default learning rate
    learning_rate_multiplier: Annotated[float | None, Limit("greater than 0", lambda x: x > 0)] = None
    warmup_ratio: float = 0.1  # share of all steps
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.learning_rate is not None and self.learning_rate_multiplier is not None:
            raise InvalidOption(
                "learning_rate_multiplier",
                "learning_rate and learning_rate_multiplier cannot both be given; give only one.",
            )
        check(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "from 0 to less than 1")
        check(0 <= self.weight_decay <= 1, "weight_decay", self.weight_decay, "from 0 to 1")
        check(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "greater than 0")


@options
class Lora:
    """The options of low-rank adapters, arXiv 2106.09685. Training changes the adapters and leaves the model's own
    weights frozen."""

    r: Annotated[int, Limit("from 1 to 1024", lambda x: 1 <= x <= 1024)] = 32
    alpha: Positive = 64
    # share of the adapter's inputs that are set to 0
    dropout: Annotated[float, Limit("from 0 to less than 1", lambda x: 0 <= x < 1)] = 0.0
    use_rslora: bool = False  # scales by alpha / sqrt(r), arXiv 2312.03732, instead of alpha / r
    use_dora: bool = False  # trains magnitudes and directions separately, arXiv 2402.09353
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"  # means all linear layers but the head

    def __post_init__(self) -> None:
        names = self.target_modules
        check(bool(names), "target_modules", names, '"all-linear" or a list of names of modules')


MAX_LENGTH = 2048  # the default of max_length
ADAPTERS_RATE = 10  # an adapter's default learning rate is ten times the objective's


def default_learning_rate(objective: Objective, *, with_adapter: bool) -> float:
    """Returns the learning rate of a run that does not choose one. Rounds it to six digits, to remove the error of a
    product such as 10 * 1e-6 = 9.999999999999999e-06."""
    rate = objective.traits.default_learning_rate
    return float(f"{rate * ADAPTERS_RATE:.6g}") if with_adapter else rate


Quantization = Literal["nf4"]  # the number format of an adapter's frozen base
Sharding = Literal["auto", "replicated", "full", "hybrid"]
Truncation = Literal["drop", "keep_start", "keep_end"]


@options
class EarlyStop:
    """The options of early stopping, which ends a training run once its evaluations no longer improve."""

    patience: Annotated[int, Limit("at least 1", lambda x: x >= 1)]  # evaluations without a gain that end the run
    min_gain: NotNegative = 0.0  # least improvement over the best value so far; an equal value is never a gain


@options
class TrainConfig:
    """The options of one training run. `resolved` fills in the defaults that depend on the training data."""

    objective: Objective = field(default_factory=Dpo)
    optim: Optim = field(default_factory=Optim)
    n_epochs: Annotated[int | None, Limit("from 1 to 50", lambda x: 1 <= x <= 50)] = None
    # groups in one optimizer step, summed over all ranks
    batch_size: Annotated[int | None, Limit("from 1 to 256", lambda x: 1 <= x <= 256)] = None
    # the most tokens of a prompt and one completion; the default means fewer if the model has fewer positions
    max_length: int = MAX_LENGTH
    truncation: Truncation = "drop"  # of longer groups; keep_start cuts completions' ends, keep_end the prompt's start
    max_tokens_per_pack: int | None = None  # in one forward pass on one rank; None: as many as memory holds
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"  # auto: on if max_length tokens do not fit
    sharding: Sharding = "auto"  # how weights are split over ranks
    checkpoint_steps: int | None = None  # steps between checkpoints; None: about four in a run
    best_metric: Metric = LOSS  # the evaluation metric by which checkpoints and `early_stop` are judged
    early_stop: EarlyStop | None = None  # None: the run takes all its steps
    seed: int = 0

    def __post_init__(self) -> None:
        every, multiplier = self.checkpoint_steps, self.optim.learning_rate_multiplier
        most = 1 / (ADAPTERS_RATE * self.objective.traits.default_learning_rate)  # a learning rate is at most 1
        check(multiplier is None or multiplier <= most, "learning_rate_multiplier", multiplier, f"at most {most:g}")
        check(every is None or every >= 1, "checkpoint_steps", every, "at least 1")
        check(2 <= self.max_length <= 1_048_576, "max_length", self.max_length, "from 2 to 1048576")
        check(
            self.max_tokens_per_pack is None or self.max_tokens_per_pack >= self.max_length,
            "max_tokens_per_pack",
            self.max_tokens_per_pack,
            f"at least max_length, which is {self.max_length}",
        )
        known = self.objective.traits.best_metrics
        check(self.best_metric in known, "best_metric", self.best_metric, f"one of {', '.join(known)}")
        check(0 <= self.seed < 2**31, "seed", self.seed, "from 0 to 2147483647")

    def settled(self, *, with_adapter: bool = False) -> "TrainConfig":
        """Returns a copy of the options with the number of epochs and the learning rate decided. The default learning
        rate of an adapter is higher than that of a whole model."""
        traits = self.objective.traits
        default_rate = default_learning_rate(self.objective, with_adapter=with_adapter)
        rate = self.optim.learning_rate or default_rate * (self.optim.learning_rate_multiplier or 1)
        optim = replace(self.optim, learning_rate=rate, learning_rate_multiplier=None)
        return replace(self, optim=optim, n_epochs=self.n_epochs or traits.default_epochs)

    def resolved(self, num_groups: int, *, with_adapter: bool = False) -> "TrainConfig":
        """Returns a copy of the options with a value for every option that depends on the data: epochs, learning rate,
        batch size and checkpoint interval. `num_groups` is the number of training groups (prompts with their
        completions)."""
        run = self.settled(with_adapter=with_adapter)
        assert run.n_epochs is not None
        batch = min(run.batch_size or max(8, min(64, num_groups // 50)), num_groups)
        every = run.checkpoint_steps or max(1, -(-run.n_epochs * -(-num_groups // batch) // 4))
        return replace(run, batch_size=batch, checkpoint_steps=every)

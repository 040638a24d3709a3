"""Defines the options of a training run as frozen dataclasses that check their values. Uses only the standard library.

The same classes are fields of a stored job and of the request that creates a job. pydantic refuses unknown keys of a
request, and `__post_init__` refuses values out of range.
"""

from dataclasses import field, replace
from typing import Annotated, Literal

from dpo_core.options import (
    LOSS,
    Doc,
    Dpo,
    InvalidOption,
    Limit,
    Metric,
    NotNegative,
    Objective,
    Positive,
    check,
    options,
)


@options
class Optim:
    """The options of the optimizer, AdamW: its weight decay, the limit on the gradient's norm, and its learning rate
    (the highest value, the warm-up, and the schedule after the warm-up)."""

    # None means the objective's default
    learning_rate: Annotated[
        float | None,
        Limit("greater than 0 and at most 1", lambda x: 0 < x <= 1),
        Doc("The highest learning rate, after the warm-up."),
    ] = None
    learning_rate_multiplier: Annotated[
        float | None,
        Limit("greater than 0", lambda x: x > 0),
        Doc("A factor on the default learning rate. Give this option or learning_rate, not both."),
    ] = None
    warmup_ratio: Annotated[
        float,
        Limit("from 0 to less than 1", lambda x: 0 <= x < 1),
        Doc(
            "The share of all optimizer steps, at the start of the run, in which the learning rate rises to its "
            "highest value."
        ),
    ] = 0.1
    schedule: Annotated[
        Literal["linear", "cosine", "constant"],
        Doc(
            "How the learning rate changes after the warm-up: 'linear' and 'cosine' lower it towards 0, 'constant' "
            "keeps it."
        ),
    ] = "linear"
    weight_decay: Annotated[
        float,
        Limit("from 0 to 1", lambda x: 0 <= x <= 1),
        Doc("AdamW's weight decay: how strongly each step pulls the weights towards 0."),
    ] = 0.0
    max_grad_norm: Annotated[
        float,
        Limit("greater than 0", lambda x: x > 0),
        Doc("The largest norm of the gradient of a step. A larger gradient is scaled down to this norm."),
    ] = 1.0

    def __post_init__(self) -> None:
        if self.learning_rate is not None and self.learning_rate_multiplier is not None:
            raise InvalidOption(
                "learning_rate_multiplier",
                "learning_rate and learning_rate_multiplier cannot both be given; give only one.",
            )


@options
class Lora:
    """The options of a low-rank adapter (LoRA), arXiv 2106.09685. Training changes the adapter and leaves the model's
    own weights frozen."""

    r: Annotated[
        int,
        Limit("from 1 to 1024", lambda x: 1 <= x <= 1024),
        Doc("The rank of the adapter. A higher rank can learn more and needs more memory."),
    ] = 32
    alpha: Annotated[Positive, Doc("The adapter's output is multiplied by alpha / r.")] = 64
    dropout: Annotated[
        float,
        Limit("from 0 to less than 1", lambda x: 0 <= x < 1),
        Doc("The share of the adapter's inputs that training sets to 0 at random."),
    ] = 0.0
    use_rslora: Annotated[
        bool, Doc("Multiplies the adapter's output by alpha / sqrt(r), not by alpha / r, arXiv 2312.03732.")
    ] = False
    use_dora: Annotated[bool, Doc("Trains the size and direction of weights separately, arXiv 2402.09353.")] = False
    target_modules: Annotated[
        Literal["all-linear"] | tuple[str, ...],
        Doc(
            "The modules that get an adapter: a list of names, such as q_proj, or all-linear, which means all linear "
            "layers but the head."
        ),
    ] = "all-linear"

    def __post_init__(self) -> None:
        names = self.target_modules
        check(bool(names), "target_modules", names, '"all-linear" or a list of names of modules')


MAX_LENGTH = 2048  # the default of max_length
ADAPTERS_RATE = 10  # an adapter's default learning rate is ten times the objective's


def default_learning_rate(objective: Objective, *, with_adapter: bool) -> float:
    """Returns the learning rate of a run whose user has not chosen one: the objective's default or, if the run trains
    an adapter (`with_adapter`), ten times this default. The result is rounded to six significant digits, because
    floating-point numbers multiply with an error: 10 * 1e-6 = 9.999999999999999e-06."""
    rate = objective.traits.default_learning_rate
    return float(f"{rate * ADAPTERS_RATE:.6g}") if with_adapter else rate


Quantization = Literal["nf4"]  # the number format of an adapter's frozen base
Sharding = Literal["auto", "replicated", "full", "hybrid"]
Truncation = Literal["drop", "keep_start", "keep_end"]


@options
class EarlyStop:
    """The options of early stopping, which ends a training run once its evaluations no longer improve: how many
    evaluations in a row may bring no gain (`patience`), and the least improvement that counts as a gain (`min_gain`).
    """

    patience: Annotated[
        int,
        Limit("at least 1", lambda x: x >= 1),
        Doc("The number of evaluations in a row without a gain after which the run ends."),
    ]
    min_gain: Annotated[
        NotNegative,
        Doc("The least improvement over the best value so far that counts as a gain. An equal value is never a gain."),
    ] = 0.0


@options
class TrainConfig:
    """The options of one training run, such as the objective, the optimizer, the batch size and the maximum length. The
    method `resolved` fills in the defaults that depend on the training data.
    """

    objective: Objective = field(default_factory=Dpo)
    optim: Optim = field(default_factory=Optim)
    n_epochs: Annotated[
        int | None, Limit("from 1 to 50", lambda x: 1 <= x <= 50), Doc("The number of passes over the training data.")
    ] = None
    batch_size: Annotated[
        int | None,
        Limit("from 1 to 256", lambda x: 1 <= x <= 256),
        Doc(
            "The number of rows in one optimizer step, over all workers together. By default a fiftieth of all rows, "
            "but at least 8 and at most 64."
        ),
    ] = None
    max_length: Annotated[
        int,
        Limit("from 2 to 1048576", lambda x: 2 <= x <= 1_048_576),
        Doc(
            "The most tokens of a prompt together with one answer. By default 2048, or the number of the model's "
            "positions if this is lower."
        ),
    ] = MAX_LENGTH
    truncation: Annotated[
        Truncation,
        Doc(
            "What happens to rows longer than max_length: 'drop' leaves them out, 'keep_start' cuts the ends of "
            "answers, and 'keep_end' cuts the start of the prompt."
        ),
    ] = "drop"
    max_tokens_per_pack: Annotated[
        int | None,
        Doc(
            "The most tokens that one worker computes in one forward pass, at least max_length. By default as many as "
            "its memory holds."
        ),
    ] = None
    activation_checkpointing: Annotated[
        Literal["auto", "on", "off"],
        Doc(
            "'on' saves memory: the backward pass computes activations a second time. 'auto' means 'on' if max_length "
            "tokens would not fit into memory otherwise."
        ),
    ] = "auto"
    sharding: Annotated[
        Sharding,
        Doc(
            "How the weights are split: not at all (replicated), over all workers (full), over the workers of each "
            "node (hybrid), or over as few workers as their memory allows (auto)."
        ),
    ] = "auto"
    checkpoint_steps: Annotated[
        int | None,
        Limit("at least 1", lambda x: x >= 1),
        Doc("The number of optimizer steps between two checkpoints. By default a quarter of the run."),
    ] = None
    best_metric: Annotated[
        Metric, Doc("The validation metric by which checkpoints are compared. The option early_stop watches it, too.")
    ] = LOSS
    early_stop: Annotated[
        EarlyStop | None,
        Doc('Ends the job when its evaluations no longer improve, such as {"patience": 3, "min_gain": 0}.'),
    ] = None  # None: the run takes all its steps
    seed: int = 0

    def __post_init__(self) -> None:
        multiplier = self.optim.learning_rate_multiplier
        most = 1 / (ADAPTERS_RATE * self.objective.traits.default_learning_rate)  # a learning rate is at most 1
        check(multiplier is None or multiplier <= most, "learning_rate_multiplier", multiplier, f"at most {most:g}")
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
        """Returns a copy of the options in which the number of epochs and the learning rate are set: to the user's
        values or, where the user has chosen none, to the objective's defaults. `with_adapter` says whether the run
        trains an adapter, which has a higher default learning rate than a whole model."""
        traits = self.objective.traits
        default_rate = default_learning_rate(self.objective, with_adapter=with_adapter)
        rate = self.optim.learning_rate or default_rate * (self.optim.learning_rate_multiplier or 1)
        optim = replace(self.optim, learning_rate=rate, learning_rate_multiplier=None)
        return replace(self, optim=optim, n_epochs=self.n_epochs or traits.default_epochs)

    def resolved(self, num_groups: int, *, with_adapter: bool = False) -> "TrainConfig":
        """Returns a copy of the options in which all those options are set that the user may leave open: epochs,
        learning rate, batch size and checkpoint interval. `num_groups` is the number of training groups (prompts with
        their completions), on which the last two depend. `with_adapter` says whether the run trains an adapter, which
        has a higher default learning rate."""
        run = self.settled(with_adapter=with_adapter)
        assert run.n_epochs is not None
        batch = min(run.batch_size or max(8, min(64, num_groups // 50)), num_groups)
        every = run.checkpoint_steps or max(1, -(-run.n_epochs * -(-num_groups // batch) // 4))
        return replace(run, batch_size=batch, checkpoint_steps=every)

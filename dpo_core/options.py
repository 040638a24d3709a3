"""Defines the options of every objective, and names the paper of each objective. Uses only the standard library.

In every objective a higher `beta` keeps the policy closer to its reference. `dpo_core.objectives.losses` has the
formulas and the code that computes them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, TypeVar, dataclass_transform, get_args

REFUSE_UNKNOWN_KEYS = {"extra": "forbid"}
Kind = Literal["demonstrations", "pairs", "rankings", "ratings", "unpaired"]
Metric = Literal[
    "eval/loss",
    "eval/mean_token_accuracy",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "eval/accuracy",
    "eval/margin",
]
"""A metric by which evaluations are compared. For `eval/loss` a lower value is better, for all others a higher one."""

LOSS: Metric = "eval/loss"
T = TypeVar("T")


class InvalidOption(ValueError):
    """Raised for an option with a value that training cannot use. `field` is the option's name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)  # unpickling in another process needs both arguments
        self.field = field

    def __str__(self) -> str:
        return str(self.args[1])


def check(valid: bool, field: str, value: object, limit: str) -> None:
    """Raises InvalidOption unless `valid` is true. `field` is the option's name and `value` its value; `limit` says in
    words which values are allowed, because the error reads `<field> is <value>; it must be <limit>.`"""
    if not valid:
        raise InvalidOption(field, f"{field} is {value}; it must be {limit}.")


@dataclass(frozen=True)
class Limit:
    """A limit on a numeric option, written into the option's annotation. Each new object of a class with the decorator
    `options` checks the limits of its options; the value None is not checked. `words` describes the allowed values, and
    `admits` returns whether a value is allowed."""

    words: str  # the end of the sentence "it must be …"
    admits: Callable[[float], bool]


@dataclass(frozen=True)
class Doc:
    """The description of an option for the user, as the text `words`. It is written into the option's annotation."""

    words: str


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """Class decorator: makes a class of options a frozen, keyword-only dataclass that checks its values. pydantic
    refuses unknown keys for such a class.

    Each new instance first checks the `Limit` of every option, and then calls the class's own `__post_init__`, which
    may check several options together.
    """
    limits = [
        (name, limit)
        for name, kind in cls.__annotations__.items()
        for limit in getattr(kind, "__metadata__", ())
        if isinstance(limit, Limit)
    ]
    check_joint_rules = getattr(cls, "__post_init__", None)

    def post_init(self: T) -> None:
        for name, limit in limits:
            value = getattr(self, name)
            check(value is None or limit.admits(value), name, value, limit.words)
        if check_joint_rules:
            check_joint_rules(self)

    cls.__post_init__ = post_init  # type: ignore[attr-defined]
    cls.__pydantic_config__ = REFUSE_UNKNOWN_KEYS  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The properties of an objective that the trainer and the service need to know: the kinds of data from which the
    objective learns, what its loss needs (such as a reference), what it trains (a policy or a reward model), and its
    defaults."""

    learns_from: tuple[Kind, ...]
    needs_reference: bool = True
    takes_margins: bool = False
    needs_whole_batch: bool = False  # the loss of a group depends on other groups of the global batch
    needs_other_prompts: bool = False  # the global batch must hold completions of other prompts, rated nan
    needs_reference_heads: bool = False  # the loss reads ref_head_logps, of completions' first tokens
    num_outputs: int = 0  # outputs of the reward model's head; 0: the objective trains a policy
    reward: Literal["logratios", "logps", "mean_logps"] = "logratios"  # the reward in metrics is beta times this value
    default_learning_rate: float = 1e-6
    default_epochs: int = 1

    @property
    def best_metrics(self) -> tuple[Metric, ...]:
        """The evaluation metrics by which checkpoints of this objective can be compared."""
        if self.learns_from == ("demonstrations",):
            return LOSS, "eval/mean_token_accuracy"
        if self.num_outputs:
            return LOSS, "eval/accuracy", "eval/margin"
        return LOSS, "eval/rewards/accuracies", "eval/rewards/margins"


ON_PAIRS = Traits(learns_from=("pairs",))
ON_RANKINGS = replace(ON_PAIRS, learns_from=("pairs", "rankings", "ratings"))
WITHOUT_REFERENCE = replace(ON_PAIRS, needs_reference=False)
ON_LABELS = Traits(learns_from=("unpaired", "pairs"), needs_whole_batch=True)
# A new head needs larger steps than a policy does; TRL's 1e-4 is too large for the layers below the head.
FOR_REWARDS = replace(ON_RANKINGS, needs_reference=False, num_outputs=1, default_learning_rate=1e-5)


Positive = Annotated[float, Limit("greater than 0 and finite", lambda x: 0 < x < math.inf)]
NotNegative = Annotated[float, Limit("0 or more and finite", lambda x: 0 <= x < math.inf)]
CLOSER = Doc("A higher value keeps the policy closer to its reference.")
FLIPPED = Doc("The assumed probability that chosen and rejected are swapped in a pair.")
Beta = Annotated[float, Limit("greater than 0 and at most 100", lambda x: 0 < x <= 100), CLOSER]
RewardScale = Annotated[
    float,
    Limit("greater than 0 and at most 100", lambda x: 0 < x <= 100),
    Doc("The factor that turns log-probabilities into rewards."),
]
Smoothing = Annotated[float, Limit("greater than 0 and less than 0.5", lambda x: 0 < x < 0.5), FLIPPED]
NllWeight = Annotated[NotNegative, Doc("The weight of the chosen completion's negative log-likelihood in the loss.")]


@options
class Supervised:
    """Supervised fine-tuning. The loss is the negative log-likelihood of the completion: a mean over the tokens of the
    global batch."""

    traits: ClassVar = Traits(
        learns_from=("demonstrations",), needs_reference=False, default_learning_rate=2e-5, default_epochs=3
    )
    type: Literal["supervised"] = "supervised"


@options
class Dpo:
    """Direct Preference Optimization, arXiv 2305.18290, equation 7; for rankings its Plackett-Luce form, appendix A.3.

    If a row has a margin, the reward of the chosen completion must exceed that of the rejected one by this margin
    (arXiv 2402.10571).
    """

    traits: ClassVar = replace(ON_RANKINGS, takes_margins=True)
    type: Literal["dpo"] = "dpo"
    beta: Annotated[float, Limit("greater than 0 and at most 2", lambda x: 0 < x <= 2), CLOSER] = 0.1
    mean_over_choices: Annotated[
        bool, Doc("For rankings: the loss is the mean of its terms (true), or their sum as in the paper (false).")
    ] = False


@options
class Cdpo:
    """Conservative DPO, ericmitchell.ai/cdpo.pdf: assumes that a pair is labelled the wrong way round with probability
    `label_smoothing`."""

    traits: ClassVar = ON_PAIRS
    type: Literal["cdpo"] = "cdpo"
    beta: Beta = 0.1
    label_smoothing: Smoothing = 0.1


@options
class RobustDpo:
    """Robust DPO, arXiv 2403.00409: the loss is unbiased if pairs are labelled the wrong way round with probability
    `label_smoothing`."""

    traits: ClassVar = ON_PAIRS
    type: Literal["robust_dpo"] = "robust_dpo"
    beta: Beta = 0.1
    label_smoothing: Smoothing = 0.1


@options
class Ipo:
    """Identity Preference Optimization, arXiv 2310.12036, equation 17: pulls the lead of the chosen completion's
    log-ratio over that of the rejected one to 1 / (2 beta). `beta` is the paper's tau.
    """

    traits: ClassVar = ON_PAIRS
    type: Literal["ipo"] = "ipo"
    beta: Beta = 0.1
    length_average: Annotated[
        bool, Doc("Log-ratios are means over tokens, as for the paper's results (true), or sums over tokens (false).")
    ] = True


@options
class Hinge:
    """A hinge loss on the log-ratio of the chosen minus that of the rejected completion. The loss is that of SLiC,
    arXiv 2305.10425, in the normalized form of RSO, arXiv 2309.06657."""

    traits: ClassVar = ON_PAIRS
    type: Literal["hinge"] = "hinge"
    beta: Beta = 0.1


@options
class DpoNorm:
    """Length-normalized DPO, arXiv 2411.15124 (Tülu 3), section 5.1: each completion's log-ratio is divided by its
    number of tokens."""

    traits: ClassVar = ON_PAIRS
    type: Literal["dpo_norm"] = "dpo_norm"
    beta: Beta = 5.0


@options
class Kto:
    """Kahneman-Tversky Optimization, arXiv 2402.01306: learns from completions that are each desirable or
    undesirable."""

    traits: ClassVar = replace(ON_LABELS, needs_other_prompts=True)
    type: Literal["kto"] = "kto"
    beta: Beta = 0.1
    desirable_weight: Annotated[Positive, Doc("The weight of desirable completions, the paper's lambda_D.")] = 1.0
    undesirable_weight: Annotated[Positive, Doc("The weight of undesirable completions, the paper's lambda_U.")] = 1.0


@options
class Bco:
    """Binary Classifier Optimization, arXiv 2404.04656: learns from completions that are each good or bad. The value
    that the paper calls delta is here the mean of all rewards so far in the run."""

    traits: ClassVar = ON_LABELS
    type: Literal["bco"] = "bco"
    beta: Beta = 0.1


@options
class Orpo:
    """Odds Ratio Preference Optimization, arXiv 2403.07691, equation 6: the negative log-likelihood of the chosen
    completion, plus a loss on the odds ratio of chosen and rejected."""

    traits: ClassVar = replace(WITHOUT_REFERENCE, default_learning_rate=8e-6, reward="mean_logps")
    type: Literal["orpo"] = "orpo"
    odds_weight: Annotated[
        Positive, Doc("The weight of the odds ratio, the paper's lambda. Rewards in metrics use this weight as beta.")
    ] = 0.1


@options
class Cpo:
    """Contrastive Preference Optimization, arXiv 2401.08417: DPO without a reference, plus the negative log-likelihood
    of the chosen completion."""

    traits: ClassVar = replace(WITHOUT_REFERENCE, reward="logps")
    type: Literal["cpo"] = "cpo"
    beta: RewardScale = 0.1
    nll_weight: NllWeight = 1.0  # alpha
    length_average: Annotated[
        bool,
        Doc(
            "The log-likelihood of the chosen completion is a mean over tokens, as in the paper's code (true), or a "
            "sum over tokens (false)."
        ),
    ] = True


@options
class Simpo:
    """Simple Preference Optimization, arXiv 2405.14734, equation 6: DPO without a reference, on mean log-probabilities
    per token, with a target margin.

    `gamma_beta_ratio` is the target margin gamma divided by beta, as in the paper's published configurations: the loss
    subtracts `beta * gamma_beta_ratio`. Other programs ask for gamma itself.
    """

    traits: ClassVar = replace(WITHOUT_REFERENCE, reward="mean_logps")
    type: Literal["simpo"] = "simpo"
    beta: RewardScale = 2.5
    gamma_beta_ratio: Annotated[NotNegative, Doc("The target margin gamma divided by beta.")] = 0.5


@options
class ApoZero:
    """Anchored Preference Optimization, arXiv 2408.06266, equation 7: for chosen answers that are better than the
    policy's own."""

    traits: ClassVar = ON_PAIRS
    type: Literal["apo_zero"] = "apo_zero"
    beta: Beta = 0.1


@options
class ApoDown:
    """Anchored Preference Optimization, arXiv 2408.06266, equation 8: for chosen answers that are worse than the
    policy's own."""

    traits: ClassVar = ON_PAIRS
    type: Literal["apo_down"] = "apo_down"
    beta: Beta = 0.1


@options
class Nca:
    """Noise Contrastive Alignment on pairs, arXiv 2402.05369: the loss has terms for the chosen and for the rejected
    completion separately, and not for the difference between the two.
    """

    traits: ClassVar = ON_PAIRS
    type: Literal["nca"] = "nca"
    beta: Beta = 0.1


@options
class Exo:
    """Efficient Exact Optimization on pairs, arXiv 2402.00856, equation 16: the KL divergence between the policy's
    preference in a pair and the pair's label, which `label_smoothing` smooths."""

    traits: ClassVar = ON_PAIRS
    type: Literal["exo"] = "exo"
    beta: Beta = 0.1
    label_smoothing: Smoothing = 1e-3  # never 0, because the loss takes its logarithm


@options
class Sppo:
    """Self-Play Preference Optimization with hard labels, arXiv 2405.00675, equation 4.7: pulls the log-ratio of the
    chosen completion to 1 / (2 beta) and that of the rejected one to -1 / (2 beta). `beta` is the paper's 1 / eta."""

    traits: ClassVar = ON_PAIRS
    type: Literal["sppo"] = "sppo"
    beta: Beta = 0.1


@options
class Aot:
    """Alignment via Optimal Transport, arXiv 2406.05882. Each pair of the global batch has two values. The loss
    compares the i-th smallest first value with the i-th smallest second value. The option `paired` says which
    values."""

    traits: ClassVar = replace(ON_PAIRS, needs_whole_batch=True)
    type: Literal["aot"] = "aot"
    beta: Beta = 0.1
    paired: Annotated[
        bool,
        Doc(
            "The loss compares margins under the policy with margins under the reference (true), or log-ratios of "
            "chosen completions with those of rejected ones (false)."
        ),
    ] = True
    label_smoothing: Annotated[float, Limit("in [0, 0.5)", lambda x: 0 <= x < 0.5), FLIPPED] = 0.0


@options
class Discopop:
    """DiscoPOP, arXiv 2406.08414, equation 5: a loss that a language model discovered, a mixture of logistic and
    exponential loss."""

    traits: ClassVar = ON_PAIRS
    type: Literal["discopop"] = "discopop"
    beta: Beta = 0.1
    tau: Annotated[
        Positive, Doc("The temperature at which two losses are mixed: a higher value mixes them more evenly.")
    ] = 0.05


@options
class Dpop:
    """DPO-Positive (Smaug), arXiv 2402.13228: DPO with a penalty if the chosen completion becomes less likely than
    under the reference."""

    traits: ClassVar = ON_PAIRS
    type: Literal["dpop"] = "dpop"
    beta: Beta = 0.1
    penalty: Annotated[
        NotNegative, Doc("The weight of the penalty for chosen log-ratios below 0, the paper's lambda.")
    ] = 50.0


@options
class Rpo:
    """DPO plus the chosen completion's mean negative log-likelihood per token, arXiv 2404.19733."""

    traits: ClassVar = ON_PAIRS
    type: Literal["rpo"] = "rpo"
    beta: Beta = 0.1
    nll_weight: NllWeight = 1.0  # alpha


@options
class LdDpo:
    """Length-desensitized DPO, arXiv 2409.06411: tokens of the longer completion beyond the length of the shorter one
    count less, under the policy and under the reference."""

    traits: ClassVar = replace(ON_PAIRS, needs_reference_heads=True)
    type: Literal["ld_dpo"] = "ld_dpo"
    beta: Beta = 0.1
    tail_weight: Annotated[
        float,
        Limit("from 0 to 1", lambda x: 0 <= x <= 1),
        Doc("The weight of tokens beyond the shorter completion's length, the paper's alpha."),
    ] = 0.5


@options
class RDpo:
    """Length-regularized DPO, arXiv 2403.19159: DPO with a term for the difference in length between chosen and
    rejected completion."""

    traits: ClassVar = ON_PAIRS
    type: Literal["r_dpo"] = "r_dpo"
    beta: Beta = 0.1
    length_weight: Annotated[
        NotNegative,
        Doc("The weight of each token of the difference in length between chosen and rejected, the paper's alpha."),
    ] = 0.01


@options
class FDpo:
    """DPO with another f-divergence in place of the reverse KL, arXiv 2309.16240."""

    traits: ClassVar = ON_PAIRS
    type: Literal["f_dpo"] = "f_dpo"
    beta: Beta = 0.1
    divergence: Annotated[
        Literal["forward_kl", "jensen_shannon", "alpha"],
        Doc("The f-divergence that measures how far the policy is from its reference."),
    ] = "jensen_shannon"
    alpha: Annotated[
        float,
        Limit("greater than 0 and less than 1", lambda x: 0 < x < 1),
        Doc("The parameter of the divergence alpha. Other divergences do not use it."),
    ] = 0.5

    def __post_init__(self) -> None:
        if self.divergence != "alpha" and self.alpha != 0.5:
            raise InvalidOption(
                "alpha",
                f"The option 'alpha' is {self.alpha}, but only the divergence 'alpha' uses this option, and "
                f"'divergence' is '{self.divergence}'; leave 'alpha' out.",
            )


@options
class Lipo:
    """Listwise Preference Optimization (LiPO-lambda), arXiv 2402.01878: compares the ranked completions of a row in
    pairs. A pair counts more if its two completions differ more in their ratings and in their ranks by reward."""

    traits: ClassVar = ON_RANKINGS
    type: Literal["lipo"] = "lipo"
    beta: Beta = 0.05


@options
class RewardBradleyTerry:
    """A Bradley-Terry reward model of preferences, arXiv 2410.01257; its loss is a mean over all pairs of a row's
    ranked completions.

    If a row has a margin, the reward of the better completion must exceed that of the worse one by this margin. If the
    rows' weights are the strengths of their preferences, and rows have no margins, this is the paper's Scaled
    Bradley-Terry.
    """

    traits: ClassVar = replace(FOR_REWARDS, takes_margins=True)
    type: Literal["reward_bradley_terry"] = "reward_bradley_terry"


@options
class RewardRegression:
    """A reward model of ratings, arXiv 2410.01257; its loss is the mean squared error over a row's completions."""

    traits: ClassVar = replace(FOR_REWARDS, learns_from=("ratings",))
    type: Literal["reward_regression"] = "reward_regression"


@options
class RewardGaussian:
    """A reward model that gives a mean and a variance of each completion's reward, as the model HPSv3 does, arXiv
    2508.03789."""

    traits: ClassVar = replace(FOR_REWARDS, num_outputs=2)
    type: Literal["reward_gaussian"] = "reward_gaussian"


RewardObjective = RewardBradleyTerry | RewardRegression | RewardGaussian
PairObjective = (
    Dpo | Cdpo | RobustDpo | Ipo | Hinge | DpoNorm | Kto | Bco | Orpo | Cpo | Simpo | ApoZero | ApoDown | Nca | Exo
    | Sppo | Aot | Discopop | Dpop | Rpo | LdDpo | RDpo | FDpo | Lipo
)  # fmt: skip


@options
class Mpo:
    """A weighted sum of objectives on the same pairs (Mixed Preference Optimization, arXiv 2411.10442).

    In this sum `supervised` is the chosen completion's mean negative log-likelihood per token.
    """

    type: Literal["mpo"] = "mpo"
    objectives: Annotated[
        tuple[PairObjective | Supervised, ...],
        Doc('The objectives of the sum, such as {"type": "dpo", "beta": 0.1}, each with options of its own.'),
    ] = field(default_factory=lambda: (Dpo(), Bco(), Supervised()))
    weights: Annotated[tuple[float, ...], Doc("The weights of `objectives`, in the same order.")] = (0.8, 0.2, 1.0)

    def __post_init__(self) -> None:
        if not self.objectives or len(self.objectives) != len(self.weights):
            counts = f"{len(self.objectives)} objectives and {len(self.weights)} weights"
            remedy = "give at least one objective, and one weight for each objective"
            raise InvalidOption("weights", f"The method 'mpo' has {counts}; {remedy}.")
        for part in self.objectives:
            check(
                isinstance(part, PairObjective | Supervised),
                "objectives",
                part.type,
                "a list of objectives that learn from pairs",
            )
        for weight in self.weights:
            check(0 < weight < math.inf, "weights", weight, "greater than 0 and finite")
        if all(part.type == "supervised" for part in self.objectives):
            raise InvalidOption(
                "objectives",
                "The option 'objectives' of 'mpo' lists only 'supervised'; "
                "add an objective that learns from pairs, or use the method 'supervised'.",
            )

    @property
    def traits(self) -> Traits:
        parts = [part.traits for part in self.objectives]
        return replace(
            ON_PAIRS,
            needs_reference=any(part.needs_reference for part in parts),
            needs_whole_batch=any(part.needs_whole_batch for part in parts),
            needs_other_prompts=any(part.needs_other_prompts for part in parts),
            needs_reference_heads=any(part.needs_reference_heads for part in parts),
        )


Objective = Supervised | PairObjective | Mpo | RewardObjective
OBJECTIVES: dict[str, type[Objective]] = {cls.__dataclass_fields__["type"].default: cls for cls in get_args(Objective)}

"""Compares the log-probabilities that the reference model's deployment in vLLM computes with those of the trainer's own
forward pass.

In training, a difference between the two would count as a reward from the first step on. This false reward would be
beta times the difference between a pair's two margins: the margin by the deployment and the margin by the trainer. The
comparison uses a sample of groups (prompts with their completions).
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from statistics import fmean

from dpo_core.encoding.encode import EncodedGroup
from services.contract import Contract
from services.training.data.dataset import Dataset, read_part

NUM_GROUPS = 64
TOLERATED = 1e-3  # in float32, most nats by which 99 of 100 tokens may differ; float32 differs by 1e-5
# Where the reference or the trainer computes in bfloat16, most reward by which pairs may differ on average. Policies
# that learn from such references differ by 0.02 nats a token, a tenth of what another order of the rows does.
TOLERATED_REWARD = 0.1  # benchmarks/training/reference_precision.py has the figures

Logps = Sequence[Sequence[Sequence[float]]]  # log-probability of each group, completion and token, in nats


class Differences(Contract):
    """Summarizes the absolute differences between log-probabilities from two sources, in nats: their mean, their 99th
    percentile, and the largest one."""

    mean: float
    p99: float
    largest: float

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, 99th percentile {self.p99:.2g}, largest {self.largest:.2g}"


class Parity(Contract):
    """Holds the differences between log-probabilities from two sources: per token (`tokens`), per pair of completions
    (`pairs`), and as rewards (`rewards`). The property `holds` says whether the differences are small enough."""

    num_groups: int
    num_tokens: int
    tokens: Differences
    pairs: Differences  # differences of the margins between a group's best and worst completion
    rewards: Differences  # beta times those of pairs
    rounds: bool = False  # whether one side computes in bfloat16

    @property
    def holds(self) -> bool:
        if self.rounds:
            return self.rewards.mean <= TOLERATED_REWARD
        return self.tokens.p99 <= TOLERATED

    def __str__(self) -> str:
        """Returns the measured differences between the log-probabilities, and the allowed difference, as a part of a
        sentence."""
        sample = f"differences in {self.num_groups} rows with {self.num_tokens} tokens, in nats"
        pairs = f"per pair {self.pairs}; in rewards {self.rewards}"
        in_bfloat16 = f"a mean of {TOLERATED_REWARD} in rewards, because bfloat16 rounds"
        allowed = in_bfloat16 if self.rounds else f"a 99th percentile of {TOLERATED} per token"
        return f"{sample}: per token {self.tokens}; {pairs}; the limit is {allowed}"


def sample(dataset: Dataset, num_groups: int = NUM_GROUPS) -> list[EncodedGroup]:
    """Returns `num_groups` groups (prompts with their completions) that are spread evenly over the dataset. Returns all
    groups if there are fewer."""
    total = dataset.num_groups
    count = min(num_groups, total)
    places = [i * total // count for i in range(count)]
    chosen: list[EncodedGroup] = []
    ends = accumulate((part.num_groups for part in dataset.parts), initial=0)
    for part, (start, end) in zip(dataset.parts, pairwise(ends), strict=True):
        if wanted := {place - start for place in places if start <= place < end}:
            chosen += [group for i, group in enumerate(read_part(dataset, part)) if i in wanted]
    return chosen


def compare(served: Logps, trainer: Logps, *, beta: float, rounds: bool = False) -> Parity:
    """Compares log-probabilities of tokens from two sources, and returns the differences: `served` comes from the
    reference model's deployment, and `trainer` from the trainer.

    `served` and `trainer` must be for the same groups (prompts with their completions) in the same order. `beta` turns
    a log-ratio into a reward, and `rounds` says whether one of the two sources computes in bfloat16.
    """
    both = [list(zip(*sides, strict=True)) for sides in zip(served, trainer, strict=True)]
    tokens = [abs(a - b) for group in both for completion in group for a, b in zip(*completion, strict=True)]
    margins = [_margin(a) - _margin(b) for a, b in zip(served, trainer, strict=True)]
    return Parity(
        num_groups=len(both),
        num_tokens=len(tokens),
        tokens=_differences(tokens),
        pairs=_differences(map(abs, margins)),
        rewards=_differences(beta * abs(margin) for margin in margins),
        rounds=rounds,
    )


def _margin(group: Sequence[Sequence[float]]) -> float:
    """Returns the margin of a group (a prompt with its completions): the log-probability of the completion that is
    preferred most minus that of the completion that is preferred least. `group` has a list for each completion, in the
    order of preference: the log-probabilities of the completion's tokens.

    For a group with one completion, returns this completion's log-probability.
    """
    best, *others = map(math.fsum, group)
    return best - others[-1] if others else best


def _differences(values: Iterable[float]) -> Differences:
    ordered = sorted(values)
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return Differences(mean=fmean(ordered), p99=p99, largest=ordered[-1])

"""The parity gate: does the deployment that scores the reference say what the trainer's own forward says?

A reference that departs from the policy shows up as reward, in every row, from the first step on.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from statistics import fmean

from dpo_core.encoding.encode import EncodedGroup
from services.contract import Contract
from services.training.data.dataset import Dataset, read_part

NUM_GROUPS = 64
TOLERATED = 1e-3  # nats: 99 of 100 tokens differ by no more. In float32 they differ by 1e-5, in bfloat16 by 0.1

Logps = Sequence[Sequence[Sequence[float]]]  # of each group, completion and token, in nats


class Differences(Contract):
    """Absolute ones, in nats."""

    mean: float
    p99: float
    largest: float

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, p99 {self.p99:.2g}, largest {self.largest:.2g}"


class Parity(Contract):
    """How far two sources of scores lie apart."""

    num_groups: int
    num_tokens: int
    tokens: Differences
    pairs: Differences  # of what the best and the worst completion of a group are apart: what becomes a margin

    @property
    def holds(self) -> bool:
        return self.tokens.p99 <= TOLERATED

    def __str__(self) -> str:
        """The part of a sentence that has the figures."""
        sample = f"{self.num_groups} rows, {self.num_tokens} tokens"
        return f"{sample}; per token {self.tokens}; per pair {self.pairs} nats; tolerated: p99 {TOLERATED} per token"


def sample(dataset: Dataset, num_groups: int = NUM_GROUPS) -> list[EncodedGroup]:
    """So many groups, or all there are, spread evenly over the data."""
    total = dataset.num_groups
    count = min(num_groups, total)
    places = [i * total // count for i in range(count)]
    chosen: list[EncodedGroup] = []
    ends = accumulate((part.num_groups for part in dataset.parts), initial=0)
    for part, (start, end) in zip(dataset.parts, pairwise(ends), strict=True):
        if wanted := {place - start for place in places if start <= place < end}:
            chosen += [group for i, group in enumerate(read_part(dataset, part)) if i in wanted]
    return chosen


def compare(served: Logps, own: Logps) -> Parity:
    """Of the same groups, in the same order."""
    both = [list(zip(*sides, strict=True)) for sides in zip(served, own, strict=True)]
    tokens = [abs(a - b) for group in both for completion in group for a, b in zip(*completion, strict=True)]
    margins = [_margin(a) - _margin(b) for a, b in zip(served, own, strict=True)]
    return Parity(
        num_groups=len(both), num_tokens=len(tokens), tokens=_differences(tokens), pairs=_differences(map(abs, margins))
    )


def _margin(group: Sequence[Sequence[float]]) -> float:
    """A group of one has only its sum."""
    best, *others = map(math.fsum, group)
    return best - others[-1] if others else best


def _differences(values: Iterable[float]) -> Differences:
    ordered = sorted(values)
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return Differences(mean=fmean(ordered), p99=p99, largest=ordered[-1])

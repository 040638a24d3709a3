"""Which checkpoints of a run are worth keeping, which one is the best, and when to stop. Standard library only.

Every answer follows from the evaluations so far, so all ranks, a resumed run and the service give the same one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from dpo_core.config import EarlyStop
from dpo_core.options import LOSS, Metric

Keep = int | Literal["all"]


class Evaluation(NamedTuple):
    """What a run's metric was at a checkpoint."""

    step: int
    value: float


def evaluations(checkpoints: Iterable[tuple[int, Mapping[str, float]]], metric: Metric) -> tuple[Evaluation, ...]:
    """Those of checkpoints, given by step and metrics, that have the metric as a finite number."""
    found = (Evaluation(step, metrics.get(metric, math.nan)) for step, metrics in checkpoints)
    return tuple(evaluation for evaluation in found if math.isfinite(evaluation.value))


def best(found: Sequence[Evaluation], metric: Metric) -> Evaluation | None:
    """Of equal ones the first, which later evaluations therefore never replace by an older one."""
    return max(found, key=lambda evaluation: _sign(metric) * evaluation.value, default=None)


def stalls(found: Sequence[Evaluation], metric: Metric, early_stop: EarlyStop | None) -> bool:
    """Whether the newest evaluations, as many as the patience, brought no gain over the best before them."""
    if early_stop is None:
        return False
    mark, num_without_gain = -math.inf, 0
    for evaluation in found:
        value = _sign(metric) * evaluation.value
        if value > mark and value - mark >= early_stop.min_gain:
            mark, num_without_gain = value, 0
        else:
            num_without_gain += 1
    return num_without_gain >= early_stop.patience


def kept(steps: Iterable[int], found: Sequence[Evaluation], metric: Metric, keep: Keep) -> set[int]:
    """The steps of the checkpoints to keep: the last `keep` and the best."""
    if keep == "all":
        return set(steps)
    top = best(found, metric)
    return {*sorted(steps)[-keep:], *([top.step] if top else [])}


def _sign(metric: Metric) -> int:
    return -1 if metric == LOSS else 1

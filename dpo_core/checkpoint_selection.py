"""Decides which checkpoints of a run to keep, which one is the best, and when to stop early. Uses only the standard
library.

Every decision depends only on the evaluations so far, so all ranks (processes of a run), a resumed run and the service
decide alike.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from dpo_core.config import EarlyStop
from dpo_core.options import LOSS, Metric

Keep = int | Literal["all"]


class Evaluation(NamedTuple):
    """An evaluation of a checkpoint: the checkpoint's step (`step`), and the `value` of the metric by which the run
    compares checkpoints (the run's option `best_metric`)."""

    step: int
    value: float


def evaluations(checkpoints: Iterable[tuple[int, Mapping[str, float]]], metric: Metric) -> tuple[Evaluation, ...]:
    """Returns the evaluations of the checkpoints: for each, its step and its value of `metric`. `checkpoints` are pairs
    of a checkpoint's step and its metrics. A checkpoint whose metrics have no finite number for `metric` is left out.
    """
    found = (Evaluation(step, metrics.get(metric, math.nan)) for step, metrics in checkpoints)
    return tuple(evaluation for evaluation in found if math.isfinite(evaluation.value))


def best(found: Sequence[Evaluation], metric: Metric) -> Evaluation | None:
    """Returns the evaluation with the best value of `metric`; None if `found` is empty. The lowest loss is best, and
    the highest value of any other metric. If several evaluations are equally good, the first of them is returned."""
    return max(found, key=lambda evaluation: _sign(metric) * evaluation.value, default=None)


def stalls(found: Sequence[Evaluation], metric: Metric, early_stop: EarlyStop | None) -> bool:
    """Whether the training run should stop early: its last `early_stop.patience` evaluations (or more) brought no gain.
    `found` has the run's evaluations in the order of their steps. Always false if `early_stop` is None.

    The first evaluation is a gain. Each later one is a gain if its value of `metric` is better than the value of the
    previous gain by at least `early_stop.min_gain`, and not equal to it.
    """
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
    """Returns the steps of the checkpoints to keep: the last `keep` of `steps`, and the step with the best value of
    `metric` among the evaluations in `found`. Returns all steps if `keep` is "all"."""
    if keep == "all":
        return set(steps)
    top = best(found, metric)
    return {*sorted(steps)[-keep:], *([top.step] if top else [])}


def _sign(metric: Metric) -> int:
    return -1 if metric == LOSS else 1

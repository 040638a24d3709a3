"""Decides, by the median stopping rule, whether a trial (one job of a sweep) is hopeless.

The rule is that of Google Vizier (Golovin et al. 2017), except that it compares the best values so far, not their
means.
"""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from services.control_plane.sweeps.requests import Goal


class Point(NamedTuple):
    """A value of a metric on validation data, and the share of the job's steps (from 0 to 1) after which the value was
    measured.
    """

    progress: float
    value: float


Curve = Sequence[Point]  # the values of one job, in order


def is_hopeless(curve: Curve, others: Sequence[Curve], goal: Goal, *, min_trials: int, min_progress: float) -> bool:
    """Whether the job with `curve` should stop: its best value is worse than the median of the best values that other
    jobs had reached after the same share of their steps.

    `curve` and `others` hold the values of the metric that the jobs have measured so far. `goal` says whether low or
    high values of the metric are better. Jobs are compared by the share of their steps, because they may have different
    numbers of steps. Returns False if fewer than `min_trials` other jobs had a value by then, or if the job has trained
    less than the share `min_progress` of its steps.
    """
    if not curve or curve[-1].progress < min_progress:
        return False
    by_then = [_best([point for point in each if point.progress <= curve[-1].progress], goal) for each in others]
    reached = [value for value in by_then if value is not None]
    own = _best(curve, goal)
    if len(reached) < min_trials or own is None:
        return False
    return own > median(reached) if goal == "minimize" else own < median(reached)


def _best(curve: Curve, goal: Goal) -> float | None:
    values = [point.value for point in curve]
    return (min if goal == "minimize" else max)(values, default=None)

"""Tests when a trial is hopeless."""

import pytest

from services.control_plane.sweeps.stopping import Point, is_hopeless

GOOD, FAIR, BAD = ([Point(0.5, value), Point(1.0, value - 0.1)] for value in (0.5, 0.6, 0.9))


def test_a_trial_that_is_worse_than_the_median_at_the_same_progress_stops() -> None:
    def stops(value: float) -> bool:
        return is_hopeless([Point(0.5, value)], [GOOD, FAIR, BAD], "minimize", min_trials=3, min_progress=0)

    assert stops(0.61)
    assert not stops(0.6)  # as good as the median
    assert not stops(0.55)


def test_for_a_metric_that_is_to_be_high_the_rule_is_mirrored() -> None:
    curves = [[Point(0.5, value)] for value in (0.1, 0.2, 0.3)]
    assert is_hopeless([Point(0.5, 0.15)], curves, "maximize", min_trials=3, min_progress=0)
    assert not is_hopeless([Point(0.5, 0.25)], curves, "maximize", min_trials=3, min_progress=0)


def test_the_best_value_so_far_counts_and_not_the_last() -> None:
    curve = [Point(0.25, 0.5), Point(0.5, 0.95)]
    assert not is_hopeless(curve, [GOOD, FAIR, BAD], "minimize", min_trials=3, min_progress=0)


@pytest.mark.parametrize(("progress", "min_trials", "min_progress"), [(0.5, 4, 0.0), (0.5, 3, 0.6), (0.4, 3, 0.0)])
def test_too_little_to_compare_with_stops_nothing(progress: float, min_trials: int, min_progress: float) -> None:
    curves = [GOOD, FAIR, BAD]
    curve = [Point(progress, 9.0)]
    assert not is_hopeless(curve, curves, "minimize", min_trials=min_trials, min_progress=min_progress)
    assert not is_hopeless([], curves, "minimize", min_trials=1, min_progress=0)

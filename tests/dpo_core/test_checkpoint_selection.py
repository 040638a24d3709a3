"""Tests which checkpoints are kept, which is the best, and when training stops early."""

import math

import pytest

from dpo_core.checkpoint_selection import Evaluation, best, evaluations, kept, stalls
from dpo_core.config import EarlyStop, TrainConfig
from dpo_core.options import OBJECTIVES, InvalidOption, Mpo

LOSS, ACCURACY = "eval/loss", "eval/rewards/accuracies"


def found(*values: float) -> list[Evaluation]:
    """Returns evaluations with these values at the steps 10, 20 and so on."""
    return [Evaluation(10 * place, value) for place, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("values", "metric", "step"),
    [
        ([0.5, 0.3, 0.4], LOSS, 20),
        ([0.5, 0.9, 0.4], ACCURACY, 20),
        ([0.5, 0.3, 0.3], LOSS, 20),
        ([0.9, 0.9], ACCURACY, 10),
        ([-1.0, -2.0], LOSS, 20),
    ],
    ids=["loss goes down", "accuracy goes up", "of equal ones the first", "also of accuracies", "below zero"],
)
def test_the_best_is_that_of_the_metrics_own_direction(values, metric, step):
    top = best(found(*values), metric)
    assert top is not None
    assert top.step == step


def test_what_was_not_evaluated_or_is_no_number_is_no_evaluation():
    checkpoints = [(1, {"loss": 0.1}), (2, {LOSS: 0.4}), (3, {LOSS: math.nan}), (4, {LOSS: -math.inf}), (5, {LOSS: 0})]
    assert evaluations(checkpoints, LOSS) == (Evaluation(2, 0.4), Evaluation(5, 0))
    assert best((), LOSS) is None


@pytest.mark.parametrize(
    ("values", "keep", "steps"),
    [
        ([0.5, 0.3, 0.4, 0.6, 0.7], 2, {20, 40, 50}),
        ([0.5, 0.3, 0.4, 0.6, 0.7], 1, {20, 50}),
        ([0.5, 0.4, 0.3], 2, {20, 30}),
        ([0.5, 0.3, 0.4], 9, {10, 20, 30}),
        ([0.5, 0.3, 0.4], "all", {10, 20, 30}),
        ([], 2, set()),
    ],
)
def test_the_last_ones_and_the_best_are_kept(values, keep, steps):
    these = found(*values)
    assert kept([each.step for each in reversed(these)], these, LOSS, keep) == steps


def test_without_evaluations_only_the_last_ones_are_kept_a_pauses_among_them():
    assert kept([10, 13, 20], (), LOSS, 2) == {13, 20}


def test_the_best_is_kept_from_its_own_checkpoint_to_the_last():
    """So the checkpoint that becomes the policy is there, in whatever order reports arrive."""
    values = [0.9, 0.7, 0.8, 0.6, 0.65, 0.61, 0.7, 0.6]
    top = best(found(*values), LOSS)
    assert top is not None
    alive: set[int] = set()
    for count in range(1, len(values) + 1):
        alive.add(10 * count)
        seen = [each for each in found(*values[:count]) if each.step in alive]
        alive = kept(alive, seen, LOSS, 1)
    assert alive == {top.step, 80} == {40, 80}


@pytest.mark.parametrize(
    ("values", "early_stop", "stops_after"),
    [
        ([0.5, 0.4, 0.45, 0.44, 0.3], EarlyStop(patience=2), 4),
        ([0.5, 0.4, 0.45, 0.39, 0.41, 0.38], EarlyStop(patience=2), None),
        ([0.5, 0.5], EarlyStop(patience=1), 2),
        ([0.5], EarlyStop(patience=1), None),
        ([0.5, 0.45, 0.41, 0.38], EarlyStop(patience=3, min_gain=0.1), None),
        ([0.5, 0.45, 0.41, 0.42], EarlyStop(patience=3, min_gain=0.1), 4),
        ([0.5, 0.25, 0.0], EarlyStop(patience=1, min_gain=0.25), None),
        ([0.5, 0.4, 0.3], None, None),
    ],
    ids=[
        "two in a row",
        "a gain begins anew",
        "equal is no gain",
        "the first is one",
        "gains add up",
        "but not to less",
        "exactly the least gain",
        "never asked",
    ],
)
def test_a_run_stops_when_its_patience_is_over(values, early_stop, stops_after):
    ends = (n for n in range(1, len(values) + 1) if stalls(found(*values[:n]), LOSS, early_stop))
    assert next(ends, None) == stops_after


def test_step_retries_follows_the_metrics_direction():
    assert stalls(found(0.5, 0.4, 0.3), ACCURACY, EarlyStop(patience=2))
    assert not stalls(found(0.5, 0.6, 0.7), ACCURACY, EarlyStop(patience=2))


@pytest.mark.parametrize(
    ("kind", "metrics"),
    [
        ("supervised", {"eval/mean_token_accuracy"}),
        ("dpo", {"eval/rewards/accuracies", "eval/rewards/margins"}),
        ("mpo", {"eval/rewards/accuracies", "eval/rewards/margins"}),
        ("reward_gaussian", {"eval/accuracy", "eval/margin"}),
    ],
)
def test_a_metric_that_the_objective_does_not_have_is_refused_with_those_it_has(kind, metrics):
    objective = Mpo() if kind == "mpo" else OBJECTIVES[kind]()
    assert {*objective.traits.best_metrics} == {LOSS} | metrics
    other = "eval/rewards/margins" if kind == "supervised" else "eval/mean_token_accuracy"
    with pytest.raises(InvalidOption, match=rf"best_metric is {other}; it must be one of eval/loss, {min(metrics)}"):
        TrainConfig(objective=objective, best_metric=other)


@pytest.mark.parametrize("options", [{"patience": 0}, {"patience": 1, "min_gain": -0.1}])
def test_an_early_stop_without_sense_is_refused(options):
    with pytest.raises(InvalidOption, match="it must be"):
        EarlyStop(**options)

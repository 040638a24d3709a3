"""Tests the accuracy and the margins that `raydpo rewards` prints, against counts by hand."""

import pytest

from services.cli.models.reward_summary import Summary


def result(rewards, ratings, subset=None):
    return {"ratings": ratings, "subset": subset, "completions": [{"reward": reward} for reward in rewards]}


def test_a_row_counts_as_correct_if_every_best_completion_is_above_every_other():
    found = Summary()
    for rewards, ratings in (
        ([3, 1], [1, 0]),  # correct, margin 2
        ([1, 3], [1, 0]),  # wrong, margin -2
        ([2, 2], [1, 0]),  # equal rewards are wrong, margin 0
        ([4, 2, 1, 0], [5, 5, 1, 0]),  # two best ones: correct, margin 3 - 0.5
        ([4, 1, 2, 0], [5, 5, 1, 0]),  # one of them is below another: wrong, margin 2.5 - 1
    ):
        found.add(result(rewards, ratings))
    assert (found.all.num_rows, found.all.num_correct) == (5, 2)
    assert found.all.margins == pytest.approx(2 - 2 + 0 + 2.5 + 1.5)
    assert found.all.accuracy == pytest.approx(0.4)


def test_rows_without_a_preference_are_left_out():
    found = Summary()
    found.add(result([1, 2], None))
    found.add(result([1, 2], [3, 3], "a"))
    assert found.all.num_rows == 0
    assert list(found.lines()) == []


def test_the_mean_of_subsets_does_not_depend_on_their_sizes():
    found = Summary()
    for rewards, subset in (([1, 0], "b"), ([1, 0], "a"), ([1, 0], "a"), ([0, 1], "a"), ([0, 1], "a"), ([1, 0], None)):
        found.add(result(rewards, [1, 0], subset))
    assert list(found.lines()) == [
        "a: accuracy 50.00%  margin 0.0000  rows 4",
        "b: accuracy 100.00%  margin 1.0000  rows 1",
        "mean of 2 subsets: accuracy 75.00%",
        "all: accuracy 66.67%  margin 0.3333  rows 6",
    ]

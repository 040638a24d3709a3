"""Tests how the numbers of completions are found by group, whatever the sizes of the groups."""

import math

import pytest
import torch

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.policy.measures import Measures

RANKING = EncodedGroup(
    [1], ([2, 3], [4], [5, 6, 7]), (-1.0, -2.0, -3.0), 1, ref_head_logps=(-0.5, -2.0, -1.5), ratings=(2.0, 2.0, 1.0)
)
SINGLE = EncodedGroup([1], ([8, 9, 9, 9],), (-4.0,), 2, ref_head_logps=(-4.0,), weight=0.5)
PAIR = EncodedGroup(
    [1], ([2], [3, 4]), (-5.0, -6.0), 3, ref_head_logps=(-5.0, -3.5), margin=0.25, others=((), ((0, 1),))
)
GROUPS = [RANKING, SINGLE, PAIR]
TABLE = torch.arange(18.0).view(6, 3)


@pytest.fixture
def measures() -> Measures:
    return Measures(GROUPS, TABLE)


def test_completions_are_listed_group_by_group(measures):
    assert measures.all.logps.tolist() == [0, 3, 6, 9, 12, 15]
    assert measures.all.head_logps.tolist() == [1, 4, 7, 10, 13, 16]
    assert measures.num_correct.tolist() == [2, 5, 8, 11, 14, 17]
    assert measures.all.lengths.tolist() == [2, 1, 3, 4, 1, 1]  # without the token that is not learned
    assert measures.all.ref_logps.tolist() == [-1, -2, -3, -4, -5, -6]
    assert measures.all.ref_head_logps.tolist() == [-0.5, -2, -1.5, -4, -5, -3.5]


def test_the_best_completion_is_the_first_of_its_group(measures):
    assert measures.starts.tolist() == [0, 3, 4]
    assert measures.chosen.logps.tolist() == [0, 9, 12]
    assert measures.chosen.logratios.tolist() == [1, 13, 17]
    assert measures.chosen.mean_logratios.tolist() == [0.5, 13 / 4, 17]
    assert measures.chosen.mean_logps.tolist() == [0, 9 / 4, 12]


def test_the_rejected_completion_of_a_pair_is_its_second():
    rejected = Measures([PAIR, PAIR], TABLE[:4]).rejected
    assert rejected.logps.tolist() == [3, 9]
    assert rejected.ref_logps.tolist() == [-6, -6]
    assert rejected.ref_head_logps.tolist() == [-3.5, -3.5]


def test_groups_of_several_sizes_are_filled_up(measures):
    rows = measures.by_group(torch.arange(6.0), -1.0)
    assert rows.tolist() == [[0, 1, 2], [3, -1, -1], [4, 5, -1]]
    assert measures.group_sums(torch.arange(6.0)).tolist() == [3, 3, 9]


def test_groups_of_one_size_need_no_filling():
    assert Measures([PAIR, PAIR], TABLE[:4]).by_group(torch.arange(4.0), -1.0).tolist() == [[0, 1], [2, 3]]


def test_only_a_lower_rating_is_worse(measures):
    pairs = measures.worse.nonzero().tolist()  # group, better completion, worse completion
    assert pairs == [[0, 0, 2], [0, 1, 2], [2, 0, 1]]


def test_a_completion_of_another_prompt_is_neither_better_nor_worse():
    group = EncodedGroup([1], ([2], [3], [4]), None, 1, ratings=(1.0, 0.0, math.nan))
    measures = Measures([group], TABLE[:3])
    assert measures.worse.nonzero().tolist() == [[0, 0, 1]]
    assert measures.ratings.isnan().tolist() == [False, False, True]


def test_groups_bring_their_weights_and_margins(measures):
    assert measures.weights.tolist() == [1, 0.5, 1]
    assert measures.margins.tolist() == [0, 0, 0.25]


def test_scores_that_one_group_lacks_are_none():
    lacking = EncodedGroup([1], ([2],), None, 1)
    assert Measures([SINGLE, lacking], TABLE[:2]).all.ref_logps is None


def test_a_reward_model_has_a_reward_and_a_variance(measures):
    assert measures.rewards.tolist() == [0, 3, 6, 9, 12, 15]
    assert measures.log_variances.tolist() == [1, 4, 7, 10, 13, 16]

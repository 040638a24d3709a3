import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.policy.batch import Segment, batches_of_like_lengths, collate, plan

PAIR = EncodedGroup([1, 2, 3], ([4, 5], [6, 7, 8]), (-1.0, -2.0), 1)
DEMONSTRATION = EncodedGroup([9], ([10],), (-3.0,), 2)


@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    num_ranks=st.integers(1, 9),
    budget=st.integers(1, 400),
)
def test_plan_places_every_group_once_under_the_budget_with_as_many_packs_on_every_rank(lengths, num_ranks, budget):
    ranks = plan(lengths, num_ranks=num_ranks, max_tokens_per_pack=budget)
    packs = [pack for rank in ranks for pack in rank]
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert len(ranks) == num_ranks
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(pack) <= 1 or sum(lengths[i] for i in pack) <= budget for pack in packs)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), num_ranks=st.integers(1, 4))
def test_plan_balances_ranks_to_within_one_group(lengths, num_ranks):
    ranks = plan(lengths, num_ranks=num_ranks, max_tokens_per_pack=100_000)
    loads = [sum(lengths[i] for pack in rank for i in pack) for rank in ranks]
    assert max(loads) - min(loads) <= max(lengths)


def test_plan_of_many_groups_that_leave_gaps_takes_seconds():
    """The time is proportional to the number of groups. Comparing each group with all packs, for each number of packs,
    took hours."""
    rng = random.Random(0)
    lengths = [rng.randint(400, 800) for _ in range(10_000)]
    started = time.process_time()
    (packs,) = plan(lengths, num_ranks=1, max_tokens_per_pack=1024)
    assert time.process_time() - started < 6
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))


@given(lengths=st.lists(st.integers(1, 300), max_size=40), budget=st.integers(1, 400))
def test_plan_takes_no_more_packs_than_balancing_needs(lengths, budget):
    """The expected number starts at what the tokens need. It is the first for which each group fits into the lightest
    pack."""
    costs = sorted((min(length, budget) for length in lengths), reverse=True)
    expected = max(1, -(-sum(costs) // budget))
    while True:
        loads = [0] * expected
        for cost in costs:
            loads[loads.index(min(loads))] += cost
        if max(loads) <= budget:
            break
        expected += 1
    assert len(plan(lengths, num_ranks=1, max_tokens_per_pack=budget)[0]) == expected


def test_plan_of_fewer_groups_than_ranks_leaves_packs_empty():
    assert plan([5], num_ranks=3, max_tokens_per_pack=10) == [[[0]], [[]], [[]]]


def test_a_group_over_the_budget_is_alone_in_its_pack():
    assert sorted(plan([50, 2, 3], num_ranks=1, max_tokens_per_pack=10)[0]) == [[0], [2, 1]]


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), least_fill=st.sampled_from([0.5, 0.75, 1.0]))
def test_sequences_of_like_lengths_are_batched_with_little_padding(lengths, least_fill):
    batches = batches_of_like_lengths(lengths, least_fill)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[i] for i in batch]
        assert sum(own) >= least_fill * len(own) * max(own)
    if least_fill == 1:
        assert len(batches) == len(set(lengths))


def test_the_prompt_is_there_once_and_completions_restart_after_it():
    batch = collate([PAIR, DEMONSTRATION])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 6, 7, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 0]
    assert batch.segments == (Segment(0, 0, 0, 4), Segment(0, 3, 4, 6), Segment(6, 6, 6, 7))


def test_the_last_prompt_token_predicts_the_first_token_of_every_completion():
    batch = collate([PAIR, DEMONSTRATION])
    assert batch.rows.tolist() == [2, 3, 2, 4, 5, 6]
    assert batch.targets.tolist() == [4, 5, 6, 7, 8, 10]
    assert batch.completion_of_row.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.in_head.tolist() == [True, True, True, True, False, True]
    assert batch.num_completion_tokens.tolist() == [2, 3, 1]


def test_without_sharing_each_completion_has_the_prompt_before_it():
    batch = collate([PAIR], share_prompts=False)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 1, 2, 3, 6, 7]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert batch.segments == (Segment(0, 0, 0, 4), Segment(4, 4, 4, 9))
    assert batch.rows.tolist() == [2, 3, 6, 7, 8]


def test_a_second_completion_of_one_token_needs_no_segment():
    batch = collate([EncodedGroup([1, 2], ([3, 4], [5]), None, 1)])
    assert batch.segments == (Segment(0, 0, 0, 3),)
    assert batch.rows.tolist() == [1, 2, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_moves_to_the_device_whole():
    moved = collate([PAIR]).to(torch.device("cuda"))
    assert moved.input_ids.is_cuda

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import load_policy
from dpo_core.policy.scorer import reference_token_logps
from services.training.data.dataset import Dataset, write_part
from services.training.reference.parity import NUM_GROUPS, TOLERATED_REWARD, compare, sample


def build_group(number: int) -> EncodedGroup:
    return EncodedGroup([1 + number % 5, 3, 4], ([5, 6 + number % 9], [7 + number % 11]), None, number)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    ranges = [range(30), range(30, 37), range(37, 200)]
    parts = [write_part(str(tmp_path), f"{i}", [build_group(n) for n in numbers]) for i, numbers in enumerate(ranges)]
    return Dataset(uri=str(tmp_path), parts=tuple(parts))


def test_a_sample_is_spread_over_all_parts(data: Dataset) -> None:
    lines = [group.line for group in sample(data)]
    assert len(lines) == NUM_GROUPS
    assert {b - a for a, b in pairwise(lines)} == {3, 4}
    assert [group.line for group in sample(data, 1000)] == list(range(200))


def test_differences_are_of_tokens_and_of_margins() -> None:
    served = [[[-1.0, -2.0], [-3.0]], [[-1.0], [-1.0]]]
    own = [[[-1.0, -2.5], [-3.25]], [[-1.0], [-1.0]]]
    found = compare(served, own, beta=0.5)
    assert (found.num_groups, found.num_tokens) == (2, 5)
    assert (found.tokens.mean, found.tokens.p99, found.tokens.largest) == (0.15, 0.5, 0.5)
    assert (found.pairs.mean, found.pairs.largest) == (0.125, 0.25)
    assert (found.rewards.mean, found.rewards.largest) == (0.0625, 0.125)
    assert not found.holds
    assert "in rewards mean 0.062, 99th percentile 0.12, largest 0.12" in str(found)
    assert "per token mean 0.15, 99th percentile 0.5, largest 0.5; per pair mean 0.12" in str(found)


def test_equal_weights_hold_and_slightly_different_ones_do_not(model_source: str, data: Dataset) -> None:
    groups = sample(data)
    policy, other = load_policy(model_source), load_policy(model_source)
    own = reference_token_logps(policy, groups, max_tokens_per_pack=100)
    assert compare(reference_token_logps(policy, groups, max_tokens_per_pack=1000), own, beta=0.1).holds
    for parameter in other.parameters():
        parameter.data *= 1.002
    assert not compare(reference_token_logps(other, groups, max_tokens_per_pack=1000), own, beta=0.1).holds


def test_in_bfloat16_rounding_is_tolerated_and_other_weights_are_not(model_source: str, data: Dataset) -> None:
    groups = sample(data)
    policy = load_policy(model_source)
    own = reference_token_logps(policy, groups, max_tokens_per_pack=1000)
    rounded = reference_token_logps(load_policy(model_source).to(torch.bfloat16), groups, max_tokens_per_pack=1000)
    assert not compare(rounded, own, beta=0.1).holds
    assert compare(rounded, own, beta=0.1, rounds=True).holds
    others = [[[logp + 0.6 for logp in best], *rest] for best, *rest in own]
    refused = compare(others, own, beta=0.1, rounds=True)
    assert refused.rewards.mean > TOLERATED_REWARD
    assert not refused.holds
    assert "the limit is a mean of 0.1 in rewards, because bfloat16 rounds" in str(refused)

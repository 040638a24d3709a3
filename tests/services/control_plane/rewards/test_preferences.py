"""Tests how rewards and preferences are computed from log-probabilities and from the outputs of reward models."""

import math
import random
from collections.abc import Sequence
from statistics import NormalDist

import pytest

from services.control_plane.rewards.preferences import Judged, explicit, implicit, probabilities, winner


def judged(*rewards: float) -> list[Judged]:
    return [explicit([reward], 1) for reward in rewards]


def test_an_implicit_reward_is_beta_times_the_log_ratio() -> None:
    assert implicit(0.1, -3.0, -5.0, 7) == Judged(pytest.approx(0.2), 7, log_ratio=2.0, logp=-3.0, reference_logp=-5.0)


def test_a_reward_models_reward_is_its_first_output() -> None:
    assert explicit([1.5, -2.0], 3) == Judged(1.5, 3, outputs=(1.5, -2.0))


def test_two_completions_have_bradley_terrys_probabilities() -> None:
    first, second = probabilities(judged(1.0, -0.5))
    assert first == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert first + second == pytest.approx(1)


def test_more_completions_have_plackett_luces_probabilities_however_large_the_rewards() -> None:
    rewards = [0.3, -1.0, 2.0]
    weights = [math.exp(reward) for reward in rewards]
    wanted = [weight / sum(weights) for weight in weights]
    assert probabilities(judged(*rewards)) == pytest.approx(wanted)
    assert probabilities(judged(*(reward + 5000 for reward in rewards))) == pytest.approx(wanted)


def test_of_two_gaussian_rewards_one_is_higher_with_the_probability_of_training() -> None:
    (mean, log_variance), (other_mean, other_log_variance) = rewards = (0.4, -0.3), (-0.2, 1.1)
    deviation = math.sqrt(math.exp(log_variance) + math.exp(other_log_variance))
    first, second = probabilities([explicit(outputs, 1) for outputs in rewards])
    assert first == pytest.approx(NormalDist().cdf((mean - other_mean) / deviation), abs=1e-4)
    assert first + second == pytest.approx(1)


@pytest.mark.parametrize("spread", [0.0, 1.5, 4.0])
def test_the_highest_of_many_gaussian_rewards_is_that_of_a_sample(spread: float) -> None:
    rng = random.Random(0)
    rewards = [(rng.gauss(0, 1), rng.uniform(-spread, spread)) for _ in range(4)]
    draws = 40_000
    wins = [0] * len(rewards)
    for _ in range(draws):
        sample = [rng.gauss(mean, math.exp(log_variance / 2)) for mean, log_variance in rewards]
        wins[sample.index(max(sample))] += 1
    found = probabilities([explicit(outputs, 1) for outputs in rewards])
    assert found == pytest.approx([count / draws for count in wins], abs=0.01)


def test_of_many_gaussian_rewards_equal_ones_are_equally_often_the_highest() -> None:
    found = probabilities([explicit([0.5, 1.0], 1) for _ in range(64)])
    assert found == pytest.approx([1 / 64] * 64)


@pytest.mark.parametrize("rewards", [[(0.0, -1e6), (1.0, 1e6)], [(1e6, 0.0), (-1e6, 0.0)], [(0.0, 0.0)]])
def test_extreme_gaussian_rewards_have_probabilities(rewards: Sequence[tuple[float, float]]) -> None:
    found = probabilities([explicit(outputs, 1) for outputs in rewards])
    assert sum(found) == pytest.approx(1)
    assert all(0 <= each <= 1 for each in found)


def test_the_winner_has_the_highest_reward_and_is_the_first_of_equal_ones() -> None:
    assert winner(judged(-1.0, 2.0, 0.0)) == 1
    assert winner(judged(0.5, 0.5)) == 0

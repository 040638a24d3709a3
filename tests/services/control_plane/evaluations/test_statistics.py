"""Tests rates, means and intervals against closed forms, reference computations and simulations."""

import math
import random
from itertools import product

import numpy as np
import pytest
import torch

from services.control_plane.evaluations import statistics
from services.control_plane.evaluations.statistics import RIDGE, Estimate


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize(("successes", "total"), [(0, 7), (3, 10), (50, 100), (12, 12)])
def test_wilsons_interval_ends_where_the_score_test_rejects_a_share(successes: int, total: int) -> None:
    found = statistics.wilson(successes, total)
    assert found.low <= found.value == successes / total <= found.high
    for end in (found.low, found.high):
        if end not in (0, 1):
            score = abs(end - found.value) / math.sqrt(end * (1 - end) / total)
            assert score == pytest.approx(statistics.Z)


def test_the_bootstraps_interval_covers_the_true_rate_about_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    draw = random.Random(1)
    truth = 0.5 * 1 + 0.2 * 0.5
    samples = [draw.choices([1.0, 0.5, 0.0], [0.5, 0.2, 0.3], k=60) for _ in range(300)]
    share = sum(covers(statistics.mean(sample), truth) for sample in samples) / len(samples)
    assert 0.91 <= share <= 0.98


def test_the_bootstraps_interval_is_that_of_the_normal_approximation_where_this_holds() -> None:
    values = [random.Random(2).gauss(3, 2) for _ in range(400)]
    found, half = statistics.mean(values), statistics.Z * float(np.std(values)) / math.sqrt(len(values))
    assert found.value == pytest.approx(float(np.mean(values)))
    assert found.low == pytest.approx(found.value - half, abs=0.03)
    assert found.high == pytest.approx(found.value + half, abs=0.03)


def test_swapping_the_sides_mirrors_the_mean_and_its_interval() -> None:
    outcomes = random.Random(3).choices([1.0, 0.5, 0.0], k=41)
    found, other = statistics.mean(outcomes), statistics.mean([1 - outcome for outcome in outcomes])
    mirrored = (1 - other.value, 1 - other.high, 1 - other.low)
    assert (found.value, found.low, found.high) == pytest.approx(mirrored, abs=1e-12)


def test_one_value_has_an_interval_without_width() -> None:
    assert statistics.mean([2.5]) == Estimate(2.5, 2.5, 2.5)


def reference_rate(outcomes: list[float], differences: list[float]) -> float:
    """Returns the length-controlled rate by a general minimizer on the likelihood as the paper writes it."""
    lengths, won = torch.tensor(differences, dtype=torch.float64), torch.tensor(outcomes, dtype=torch.float64)
    terms = torch.tanh(lengths / lengths.std(correction=0))
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    minimizer = torch.optim.LBFGS([coefficients], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> float:
        minimizer.zero_grad()
        logits = coefficients[0] + coefficients[1] * terms
        total = torch.nn.functional.binary_cross_entropy_with_logits(logits, won, reduction="sum")
        penalized = total + RIDGE / 2 * coefficients.square().sum()
        penalized.backward()
        return float(penalized.detach())

    minimizer.step(loss)
    return float(coefficients[0].detach().sigmoid())


def verbose(seed: int, count: int, favour: float) -> tuple[list[float], list[float]]:
    """Returns the outcomes and the length differences of a model that writes long, before a judge that likes length."""
    draw = random.Random(seed)
    differences = [draw.gauss(40, 50) for _ in range(count)]
    chances = [1 / (1 + math.exp(-favour - 1.5 * math.tanh(each / 50))) for each in differences]
    return [float(draw.random() < chance) for chance in chances], differences


@pytest.mark.parametrize(("seed", "favour"), [(4, 0.0), (5, 1.0), (6, -2.0)])
def test_the_length_controlled_rate_is_that_of_a_general_minimizer(seed: int, favour: float) -> None:
    outcomes, differences = verbose(seed, 150, favour)
    outcomes[::7] = [0.5] * len(outcomes[::7])
    found = statistics.length_controlled_rate(outcomes, differences)
    assert found.value == pytest.approx(reference_rate(outcomes, differences), abs=1e-6)


def test_the_length_controlled_rate_takes_the_gain_by_length_away() -> None:
    outcomes, differences = verbose(7, 3000, favour=0.0)
    assert statistics.mean(outcomes).value > 0.6
    assert covers(statistics.length_controlled_rate(outcomes, differences), 0.5)


def test_swapping_the_sides_mirrors_the_length_controlled_rate() -> None:
    outcomes, differences = verbose(8, 90, favour=0.7)
    found = statistics.length_controlled_rate(outcomes, differences)
    other = statistics.length_controlled_rate([1 - each for each in outcomes], [-each for each in differences])
    mirrored = (1 - other.value, 1 - other.high, 1 - other.low)
    assert (found.value, found.low, found.high) == pytest.approx(mirrored, abs=1e-9)


@pytest.mark.parametrize("differences", [[0.0] * 20, [float(i) for i in range(20)]])
def test_a_side_that_always_wins_has_a_length_controlled_rate_near_one(differences: list[float]) -> None:
    found = statistics.length_controlled_rate([1.0] * 20, differences)
    assert 0.97 < found.value < 1
    assert found.high <= 1


def test_answers_of_equal_length_leave_the_rate_as_it_is() -> None:
    assert statistics.length_controlled_rate([1.0] * 30 + [0.0] * 10, [0.0] * 40).value == pytest.approx(0.75, abs=1e-3)


def test_the_estimated_divergence_is_the_exact_one_on_an_enumerable_vocabulary() -> None:
    """Sequences of up to three tokens, of which the last is the end, from two small models."""
    policy, reference = ([0.5, 0.2, 0.3], [0.2, 0.5, 0.3])  # the probability of each token; the last ends a sequence
    sequences = [
        [*start, 2] if length < 3 else list(start) for length in range(4) for start in product((0, 1), repeat=length)
    ]

    def logp(tokens: list[int], model: list[float]) -> float:
        return math.fsum(math.log(model[token]) for token in tokens)

    chances = [math.exp(logp(tokens, policy)) for tokens in sequences]
    assert math.fsum(chances) == pytest.approx(1)
    ratios = [logp(tokens, policy) - logp(tokens, reference) for tokens in sequences]
    exact = math.fsum(chance * ratio for chance, ratio in zip(chances, ratios, strict=True))
    exact_length = math.fsum(chance * len(tokens) for chance, tokens in zip(chances, sequences, strict=True))
    drawn = random.Random(9).choices(range(len(sequences)), chances, k=4000)
    log_ratios, lengths = [ratios[i] for i in drawn], [float(len(sequences[i])) for i in drawn]
    per_sequence, per_token = statistics.mean(log_ratios), statistics.ratio(log_ratios, lengths)
    assert per_sequence.value == pytest.approx(exact, abs=0.05)
    assert covers(per_sequence, exact)
    assert per_token.value == pytest.approx(exact / exact_length, abs=0.02)
    assert covers(per_token, exact / exact_length)


def test_repetition_counts_runs_of_four_words_that_came_before() -> None:
    assert statistics.repetition("one two three") == 0
    assert statistics.repetition("one two three four five six") == 0
    assert statistics.repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert statistics.repetition("no " * 11) == pytest.approx(7 / 8)

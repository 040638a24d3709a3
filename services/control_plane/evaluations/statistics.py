"""Computes rates, means and their intervals from the results of an evaluation's items (prompts).

The functions depend only on their arguments, so the same results always give the same numbers.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

LEVEL = 0.95  # of all intervals
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
RESAMPLES, SEED = 1000, 0
RIDGE = 0.01  # keeps the coefficients finite if one side wins every comparison
NEWTON_STEPS, LARGEST_STEP = 100, 2.0
REPEATED_WORDS = 4  # the length of the runs of words that `repetition` compares


@dataclass(frozen=True)
class Estimate:
    """An estimated value, with the lower and the upper end of its 95% interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, total: int) -> Estimate:
    """Returns the share of successes, with its 95% interval by Wilson's score method (doi
    10.1080/01621459.1927.10502953).

    `total` is the number of trials, at least 1. The interval stays within 0 and 1, also if the share is 0 or 1.
    """
    share, shrink = successes / total, Z * Z / total
    centre = (share + shrink / 2) / (1 + shrink)
    half = Z * math.sqrt(share * (1 - share) / total + shrink / (4 * total)) / (1 + shrink)
    return Estimate(share, min(share, centre - half), max(share, centre + half))


def mean(values: Sequence[float]) -> Estimate:
    """Returns the mean of at least one value, with its 95% interval by the percentile bootstrap."""
    return bootstrap(len(values), lambda drawn: fmean(values[i] for i in drawn))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Returns the sum of the numerators divided by the sum of the denominators, with its 95% interval by the percentile
    bootstrap.

    The bootstrap draws pairs of a numerator and its denominator. All denominators must be above 0.
    """

    def of(drawn: Sequence[int]) -> float:
        return math.fsum(numerators[i] for i in drawn) / math.fsum(denominators[i] for i in drawn)

    return bootstrap(len(numerators), of)


def bootstrap(count: int, statistic: Callable[[Sequence[int]], float]) -> Estimate:
    """Returns a statistic of `count` items, with its 95% interval by the percentile bootstrap (Efron and Tibshirani
    1993, section 13.3).

    `statistic` computes the value from a list of the items' indices, in which an index may repeat. The random resamples
    are the same in every call.
    """
    draw, everything = random.Random(SEED), range(count)
    values = sorted(statistic(draw.choices(everything, k=count)) for _ in range(RESAMPLES))
    cut = int(RESAMPLES * (1 - LEVEL) / 2)
    return Estimate(statistic(everything), values[cut], values[-1 - cut])


def length_controlled_rate(outcomes: Sequence[float], length_differences: Sequence[float]) -> Estimate:
    """Returns the win rate that would be expected if both answers of each comparison had the same length, with its 95%
    interval.

    An outcome is 1 for a win, 0 for a loss and 0.5 for a tie. A length difference is the length of the first answer
    minus that of the other. The method is that of AlpacaEval 2.0 (arXiv 2404.04475, equation 2) for one pair of models:
    a logistic regression of the outcome on an intercept and tanh(difference / standard deviation of the differences).
    The rate is the logistic function of the intercept, and the ends of its interval are the logistic function of the
    ends of the intercept's Wald interval. AlpacaEval's third term, the difficulty of each instruction, is left out,
    because it can only be estimated from comparisons of many models.
    """
    spread = _deviation(length_differences)
    terms = [math.tanh(difference / spread) if spread else 0.0 for difference in length_differences]
    intercept, slope = 0.0, 0.0
    for _ in range(NEWTON_STEPS):
        rates = [_logistic(intercept + slope * term) for term in terms]
        errors = [outcome - rate for outcome, rate in zip(outcomes, rates, strict=True)]
        gradient = (
            math.fsum(errors) - RIDGE * intercept,
            math.fsum(error * term for error, term in zip(errors, terms, strict=True)) - RIDGE * slope,
        )
        inverse = _inverse_information(rates, terms)
        step = [row[0] * gradient[0] + row[1] * gradient[1] for row in inverse]
        scale = min(1.0, LARGEST_STEP / max(map(abs, step), default=0.0)) if any(step) else 1.0
        intercept, slope = intercept + scale * step[0], slope + scale * step[1]
        if max(map(abs, step)) < 1e-12:
            break
    rates = [_logistic(intercept + slope * term) for term in terms]
    half = Z * math.sqrt(_inverse_information(rates, terms)[0][0])
    return Estimate(_logistic(intercept), _logistic(intercept - half), _logistic(intercept + half))


def _inverse_information(rates: Sequence[float], terms: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Returns the inverse of the negative Hessian of the log-likelihood, with a ridge penalty, of a logistic
    regression. It is a 2x2 matrix.

    The regression has an intercept and one covariate. `rates` are the predicted probabilities of the observations, and
    `terms` the values of the covariate.
    """
    weights = [rate * (1 - rate) for rate in rates]
    a = math.fsum(weights) + RIDGE
    b = math.fsum(weight * term for weight, term in zip(weights, terms, strict=True))
    c = math.fsum(weight * term * term for weight, term in zip(weights, terms, strict=True)) + RIDGE
    determinant = a * c - b * b
    return (c / determinant, -b / determinant), (-b / determinant, a / determinant)


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else 1 - 1 / (1 + math.exp(value))


def _deviation(values: Sequence[float]) -> float:
    centre = fmean(values)
    return math.sqrt(fmean((value - centre) ** 2 for value in values))


def repetition(text: str) -> float:
    """Returns how much a text repeats itself: the share of its four-word sequences that occurred earlier in the text.

    Returns 0 for a text of fewer than four words.
    """
    words = text.split()
    runs = [tuple(words[i : i + REPEATED_WORDS]) for i in range(len(words) - REPEATED_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0

"""Computes rewards and preferences from log-probabilities, or from the outputs of reward models.

The functions depend only on their arguments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul
from statistics import NormalDist

GRID_POINTS, DEVIATIONS = 256, 5.0  # of a numerical integral: points, and standard deviations around each mean


@dataclass(frozen=True)
class Judged:
    """A completion's reward, and the numbers that the reward was computed from.

    If a reward model scored the completion, `outputs` holds the model's outputs. If a policy scored it, `logp`,
    `reference_logp` and their difference `log_ratio` hold the log-probabilities, in nats.
    """

    reward: float
    num_tokens: int
    outputs: tuple[float, ...] | None = None
    log_ratio: float | None = None  # log pi(y|x) - log pi_ref(y|x), in nats
    logp: float | None = None
    reference_logp: float | None = None


def implicit(beta: float, logp: float, reference_logp: float, num_tokens: int) -> Judged:
    """Returns a completion's implicit reward of DPO, beta (log pi(y|x) - log pi_ref(y|x)): arXiv 2305.18290, section
    5.1.

    `logp` and `reference_logp` are the completion's log-probabilities by the policy and the reference model, in nats,
    as sums over its `num_tokens` tokens. The term of the reward that depends only on the prompt is left out.
    """
    log_ratio = logp - reference_logp
    return Judged(beta * log_ratio, num_tokens, log_ratio=log_ratio, logp=logp, reference_logp=reference_logp)


def explicit(outputs: Sequence[float], num_tokens: int) -> Judged:
    """Returns the reward that a reward model gives to a completion: the first of the model's `outputs` for the
    completion.

    `num_tokens` is the completion's length, which the result also holds.
    """
    return Judged(outputs[0], num_tokens, outputs=tuple(outputs))


def winner(judged: Sequence[Judged]) -> int:
    """Returns the index in `judged` of the completion with the highest reward. If several completions have this reward,
    returns the smallest of their indices."""
    return max(range(len(judged)), key=lambda i: (judged[i].reward, -i))


def probabilities(judged: Sequence[Judged]) -> list[float]:
    """Returns, for each completion, the probability that it is preferred to all other completions. `judged` has the
    rewards of the completions of one prompt.

    If rewards are numbers, the probability is that of the Plackett-Luce model (a softmax), which for two completions is
    the Bradley-Terry model. If a reward model gives a mean and the logarithm of a variance, the probability is that the
    completion's Gaussian reward is the highest.
    """
    gaussians = [_gaussian(*each.outputs) for each in judged if each.outputs and len(each.outputs) == 2]
    if gaussians:
        return _of_gaussians(gaussians)
    highest = max(each.reward for each in judged)
    weights = [math.exp(each.reward - highest) for each in judged]
    return [weight / math.fsum(weights) for weight in weights]


def _gaussian(mean: float, log_variance: float) -> NormalDist:
    return NormalDist(mean, math.exp(min(max(log_variance, -50.0), 50.0) / 2))


def _of_gaussians(rewards: Sequence[NormalDist]) -> list[float]:
    """Returns, for each of several independent Gaussian rewards, the probability that it is the highest of them.

    This probability is the integral of the product of the other rewards' cumulative distributions over the reward's own
    distribution. The integral is computed as a sum over points around all means. The points are dense where standard
    deviations are small.
    """
    each = max(8, GRID_POINTS // len(rewards))
    steps = [DEVIATIONS * (2 * i / (each - 1) - 1) for i in range(each)]
    points = sorted({reward.mean + step * reward.stdev for reward in rewards for step in steps})
    below = [[reward.cdf(point) for reward in rewards] for point in points]
    shares = [0.0] * len(rewards)
    for (low, others_low), (high, others_high) in pairwise(zip(below, map(_all_but_one, below), strict=True)):
        for i in range(len(rewards)):
            shares[i] += (high[i] - low[i]) * (others_low[i] + others_high[i]) / 2
    return [share / math.fsum(shares) for share in shares]


def _all_but_one(factors: Sequence[float]) -> list[float]:
    """Returns one product for each factor: the product of all other factors."""
    before = accumulate(factors[:-1], mul, initial=1.0)
    after = accumulate(reversed(factors[1:]), mul, initial=1.0)
    return [one * other for one, other in zip(before, reversed(list(after)), strict=True)]

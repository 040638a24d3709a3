"""Computes the loss of each objective. Each objective has one function, whose docstring has the equation of the paper.

A function returns one loss per group (a prompt with its completions), [G] for G groups. The loss of a step is the mean
of the groups' losses over the global batch, each multiplied by the group's weight. The result does not depend on how
the batch is cut into packs, or distributed over ranks (processes). A pack holds the groups that go through one forward
pass together. The loss of `supervised` is a mean over tokens.

In the equations h is a completion's log-ratio log pi(y|x) - log pi_ref(y|x), `w` the chosen completion, `l` the
rejected one, and delta is h_w - h_l.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, softplus

from dpo_core import options as o
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.policy.measures import Completions, Measures

NEVER = -1e30  # takes the place of a reward of minus infinity: the exponential is 0, and no gradient is nan
LARGEST_EXPONENT = 80.0  # e to a larger power may overflow float32

LOSSES: dict[str, Callable[[Any, Measures], Tensor]] = {}  # by the objective's type
Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def loss(function: Loss) -> Loss:
    """Registers `function` as the loss of an objective, and returns it. The function must have the name of the
    objective's `type`, such as `dpo`."""
    LOSSES[function.__name__] = function
    return function


class Statistics:
    """The mean of all rewards so far in a run, which some objectives need. Checkpoints contain this mean."""

    def __init__(self, mean: float = 0.0, count: float = 0.0) -> None:
        self.mean = mean
        self.count = count

    def add(self, rewards: Tensor) -> float:
        """Adds `rewards` to the mean of all rewards so far in the run, and returns the new mean."""
        self.count += len(rewards)
        self.mean += (rewards.mean().item() - self.mean) * len(rewards) / self.count
        return self.mean


def losses(objective: o.Objective, measures: Measures, statistics: Statistics) -> Tensor:
    """Returns the loss of each group (a prompt with its completions), [G] for G groups. Some objectives need the mean
    of all rewards so far in the run, which `statistics` holds; for them the function also updates `statistics`."""
    if isinstance(objective, o.Mpo):
        return mpo(objective, measures, statistics)
    if isinstance(objective, o.Bco):
        return bco(objective, measures, statistics)
    loss_per_group: Tensor = LOSSES[objective.type](objective, measures)
    return loss_per_group


# --- rankings ------------------------------------------------------------------------------


@loss
def dpo(objective: o.Dpo, measures: Measures) -> Tensor:
    """Returns DPO's loss of each group (a prompt with its completions), [G] for G groups; arXiv 2305.18290, appendix
    A.3.

    The loss is -sum_i log[e^{beta h_i} / (e^{beta h_i} + sum_{j worse than i} e^{beta h_j})], with the log-ratio h_i of
    completion i. For a pair of a chosen (w) and a rejected (l) completion this is -log sigmoid(beta (h_w - h_l)),
    equation 7. Completions with the same rating are not compared.
    """
    rewards = measures.by_group(objective.beta * measures.all.logratios, NEVER)
    rivals = rewards[:, None, :].masked_fill(~measures.worse, NEVER).logsumexp(2) + measures.margins[:, None]
    has_rivals = measures.worse.any(2)  # false for the worst completions, which no other is worse than
    loss_per_group = (softplus(rivals - rewards) * has_rivals).sum(1)
    return loss_per_group / has_rivals.sum(1) if objective.mean_over_choices else loss_per_group


@loss
def lipo(objective: o.Lipo, measures: Measures) -> Tensor:
    """Returns LiPO's loss of each group (a prompt with its completions), [G] for G groups; arXiv 2402.01878.

    The loss is the sum of |g_i - g_j| |1/d_i - 1/d_j| log(1 + e^{-(s_i - s_j)}) over all pairs (i, j) of completions in
    which i is rated higher than j. Here s = beta h, with the log-ratio h of a completion. g (the paper's G) is 2^psi -
    1, with the rating psi scaled to [0, 1] in the group. d (the paper's D) is log(1 + n) for the completion with the
    n-th highest s in the group.
    """
    s = measures.by_group(objective.beta * measures.all.logratios, NEVER)
    ratings = measures.by_group(measures.ratings, math.nan)
    lowest = ratings.nan_to_num(math.inf).amin(1, keepdim=True)
    highest = ratings.nan_to_num(-math.inf).amax(1, keepdim=True)
    gains = 2 ** ((ratings - lowest) / (highest - lowest)).nan_to_num(0.0) - 1
    ranks = s.detach().argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    discounts = 1 / torch.log1p(ranks.to(s.dtype))
    weights = differences(gains).abs() * differences(discounts).abs() * measures.worse
    return (weights * softplus(-differences(s))).sum((1, 2))


def differences(values: Tensor) -> Tensor:
    """Returns values[:, i] - values[:, j] for all i and j: [G, k, k] from `values` [G, k], for G groups with k
    completions each."""
    return values[:, :, None] - values[:, None, :]


# --- pairs, against the reference ----------------------------------------------------------


def _deltas(measures: Measures) -> Tensor:
    """Returns for each of G pairs the log-ratio of the chosen completion minus that of the rejected one, [G]."""
    return measures.chosen.logratios - measures.rejected.logratios


@loss
def cdpo(objective: o.Cdpo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: (1 - eps) (-log sigmoid(beta delta)) + eps (-log sigmoid(-beta delta)).

    delta is the log-ratio of the chosen minus that of the rejected completion. eps is the objective's
    `label_smoothing`.
    """
    return _smoothed(objective.beta * _deltas(measures), objective.label_smoothing)


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """Returns the loss if a pair is labelled the wrong way round with probability `smoothing`: (1 - smoothing) (-log
    sigmoid(logits)) + smoothing (-log sigmoid(-logits))."""
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


@loss
def robust_dpo(objective: o.RobustDpo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: [(1 - eps) l(delta) - eps l(-delta)] / (1 - 2 eps), where l(x) = -log
    sigmoid(beta x).

    delta is the log-ratio of the chosen minus that of the rejected completion. eps is the objective's
    `label_smoothing`.
    """
    eps, logits = objective.label_smoothing, objective.beta * _deltas(measures)
    return (eps * logsigmoid(-logits) - (1 - eps) * logsigmoid(logits)) / (1 - 2 * eps)


@loss
def ipo(objective: o.Ipo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: (delta - 1 / (2 beta))^2. The paper calls beta tau.

    delta is the log-ratio of the chosen minus that of the rejected completion. With `length_average` a completion's
    log-ratio is a mean over its tokens, without it a sum.
    """
    chosen, rejected = measures.chosen, measures.rejected
    delta = (
        chosen.mean_logratios - rejected.mean_logratios
        if objective.length_average
        else chosen.logratios - rejected.logratios
    )
    return (delta - 1 / (2 * objective.beta)) ** 2


@loss
def hinge(objective: o.Hinge, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: max(0, 1 - beta delta). delta is the log-ratio of the chosen minus that
    of the rejected completion."""
    return relu(1 - objective.beta * _deltas(measures))


@loss
def dpo_norm(objective: o.DpoNorm, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: -log sigmoid(beta (h_w / |w| - h_l / |l|)).

    h_w and h_l are the log-ratios of the chosen and the rejected completion. |w| and |l| are the numbers of tokens of
    the chosen and the rejected completion.
    """
    return -logsigmoid(objective.beta * (measures.chosen.mean_logratios - measures.rejected.mean_logratios))


@loss
def apo_zero(objective: o.ApoZero, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: 1 - sigmoid(beta h_w) + sigmoid(beta h_l).

    h_w and h_l are the log-ratios of the chosen and the rejected completion.
    """
    chosen, rejected = objective.beta * measures.chosen.logratios, objective.beta * measures.rejected.logratios
    return 1 - chosen.sigmoid() + rejected.sigmoid()


@loss
def apo_down(objective: o.ApoDown, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: sigmoid(beta h_w) + 1 - sigmoid(beta (h_w - h_l)).

    h_w and h_l are the log-ratios of the chosen and the rejected completion.
    """
    return (objective.beta * measures.chosen.logratios).sigmoid() + 1 - (objective.beta * _deltas(measures)).sigmoid()


@loss
def nca(objective: o.Nca, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: -log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2.

    r_w = beta h_w and r_l = beta h_l, with the log-ratios h_w of the chosen and h_l of the rejected completion.
    """
    chosen, rejected = objective.beta * measures.chosen.logratios, objective.beta * measures.rejected.logratios
    return -logsigmoid(chosen) - logsigmoid(-chosen) / 2 - logsigmoid(-rejected) / 2


@loss
def exo(objective: o.Exo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: KL((sigmoid(beta delta), sigmoid(-beta delta)) || (1 - eps, eps)).

    delta is the log-ratio of the chosen minus that of the rejected completion. eps is the objective's
    `label_smoothing`.
    """
    eps, logits = objective.label_smoothing, objective.beta * _deltas(measures)
    chosen = logits.sigmoid() * (logsigmoid(logits) - math.log1p(-eps))
    return chosen + (-logits).sigmoid() * (logsigmoid(-logits) - math.log(eps))


@loss
def sppo(objective: o.Sppo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2.

    h_w and h_l are the log-ratios of the chosen and the rejected completion.
    """
    half = 0.5 / objective.beta
    return (measures.chosen.logratios - half) ** 2 + (measures.rejected.logratios + half) ** 2


@loss
def aot(objective: o.Aot, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: -log sigmoid(beta (u_(i) - v_(i))), where u_(i) and v_(i) are the i-th
    smallest u and the i-th smallest v in the global batch.

    With `paired`, u is log pi(w) - log pi(l) of a pair under the policy, and v is the same under the reference. Without
    `paired`, u is h_w and v is h_l, the log-ratios of the chosen completion w and the rejected completion l. A pair of
    weight 2 counts as two pairs of weight 1, because quantiles of weighted values are compared.
    """
    chosen, rejected = measures.chosen, measures.rejected
    if objective.paired:
        assert chosen.ref_logps is not None
        assert rejected.ref_logps is not None
        u, v = chosen.logps - rejected.logps, chosen.ref_logps - rejected.ref_logps
    else:
        u, v = chosen.logratios, rejected.logratios
    u_places, v_places, shares = _coupling(u.detach(), v.detach(), measures.weights)
    parts = shares * _smoothed(objective.beta * (u[u_places] - v[v_places]), objective.label_smoothing)
    return torch.zeros_like(u).index_add(0, u_places, parts)


def _coupling(u: Tensor, v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matches equal quantiles of u and v, which is optimal transport on a line. u[i], v[i] and weights[i] belong to
    pair i of G pairs (of a chosen and a rejected completion). Returns three tensors of [2G]; entry n of each belongs to
    match n:

    - `u_places`: the index of the matched value in u
    - `v_places`: the index of the matched value in v
    - `shares`: the share of the weight of the value in u that is matched with the value in v
    """
    weights = weights.double()
    u_order, v_order = u.argsort(), v.argsort()
    u_edges, v_edges = weights[u_order].cumsum(0), weights[v_order].cumsum(0)
    edges = torch.cat([u_edges, v_edges]).sort().values
    last = len(weights) - 1
    u_places = u_order[torch.searchsorted(u_edges, edges).clamp(max=last)]
    v_places = v_order[torch.searchsorted(v_edges, edges).clamp(max=last)]
    return u_places, v_places, (edges.diff(prepend=edges.new_zeros(1)) / weights[u_places]).to(u.dtype)


@loss
def discopop(objective: o.Discopop, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: (1 - m) (-log sigmoid(r)) + m e^{-r}, m = sigmoid(r / tau) and r = beta
    delta.

    delta is the log-ratio of the chosen minus that of the rejected completion. beta and tau are options of the
    objective.
    """
    logits = objective.beta * _deltas(measures)
    mix = (logits / objective.tau).sigmoid()
    return -(1 - mix) * logsigmoid(logits) + mix * (-logits).clamp(max=LARGEST_EXPONENT).exp()


@loss
def dpop(objective: o.Dpop, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: -log sigmoid(beta (h_w - h_l - lambda max(0, -h_w))).

    h_w and h_l are the log-ratios of the chosen and the rejected completion. lambda is the objective's `penalty`.
    """
    penalty = objective.penalty * relu(-measures.chosen.logratios)
    return -logsigmoid(objective.beta * (_deltas(measures) - penalty))


@loss
def rpo(objective: o.Rpo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: -log sigmoid(beta delta) - alpha log pi(w) / |w|.

    w is the chosen completion and |w| the number of its tokens. delta is the log-ratio of the chosen minus that of the
    rejected completion. alpha is the objective's `nll_weight`.
    """
    return -logsigmoid(objective.beta * _deltas(measures)) - objective.nll_weight * measures.chosen.mean_logps


@loss
def ld_dpo(objective: o.LdDpo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: -log sigmoid(beta delta).

    delta is the log-ratio of the chosen minus that of the rejected completion. In the log-ratio of the longer
    completion, tokens beyond the length of the shorter one have the weight `tail_weight`.
    """

    def logratios(side: Completions) -> Tensor:
        assert side.ref_head_logps is not None
        head = side.head_logps - side.ref_head_logps
        return head + objective.tail_weight * (side.logratios - head)

    return -logsigmoid(objective.beta * (logratios(measures.chosen) - logratios(measures.rejected)))


@loss
def r_dpo(objective: o.RDpo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: -log sigmoid(beta delta + alpha (|w| - |l|)).

    delta is the log-ratio of the chosen minus that of the rejected completion. |w| and |l| are the numbers of tokens of
    the chosen and the rejected completion. alpha is the objective's `length_weight`.
    """
    longer = measures.chosen.lengths - measures.rejected.lengths
    return -logsigmoid(objective.beta * _deltas(measures) + objective.length_weight * longer)


@loss
def f_dpo(objective: o.FDpo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: -log sigmoid(beta (f'(e^{h_w}) - f'(e^{h_l}))).

    f' is the derivative of the function f that defines the divergence; constants in f' cancel. h_w and h_l are the
    log-ratios of the chosen and the rejected completion.
    """

    def slope(h: Tensor) -> Tensor:
        if objective.divergence == "jensen_shannon":
            return logsigmoid(h)
        alpha = 1.0 if objective.divergence == "forward_kl" else objective.alpha
        return -(-alpha * h).clamp(max=LARGEST_EXPONENT).exp() / alpha

    return -logsigmoid(objective.beta * (slope(measures.chosen.logratios) - slope(measures.rejected.logratios)))


# --- pairs, without reference --------------------------------------------------------------


@loss
def orpo(objective: o.Orpo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: -log pi(w) / |w| - lambda log sigmoid(log odds(w) - log odds(l)).

    w is the chosen and l the rejected completion. odds(y) = p / (1 - p), where log p = log pi(y) / |y|, and |y| is the
    number of tokens of y. lambda is the objective's `odds_weight`.
    """
    chosen, rejected = measures.chosen.mean_logps, measures.rejected.mean_logps
    return -chosen - objective.odds_weight * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logps: Tensor) -> Tensor:
    """Returns the logarithm of the odds, log(p / (1 - p)), from `logps`, the logarithms of probabilities p. The result
    is exact and has a finite gradient, even if p is close to 0 or 1."""
    logps = logps.clamp(max=-1e-6)
    near_one = logps > -math.log(2)
    log_rest = torch.where(near_one, torch.log(-torch.expm1(logps)), torch.log1p(-logps.exp()))
    return logps - log_rest


@loss
def cpo(objective: o.Cpo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: -log sigmoid(beta (log pi(w) - log pi(l))) - alpha log pi(w).

    w is the chosen and l the rejected completion. alpha is the objective's `nll_weight`. With `length_average` the last
    term is divided by the number of tokens of w.
    """
    likelihood = measures.chosen.mean_logps if objective.length_average else measures.chosen.logps
    deltas = measures.chosen.logps - measures.rejected.logps
    return -logsigmoid(objective.beta * deltas) - objective.nll_weight * likelihood


@loss
def simpo(objective: o.Simpo, measures: Measures) -> Tensor:
    """Returns the loss of each of G pairs, [G]: -log sigmoid(beta (log pi(w) / |w| - log pi(l) / |l|) - gamma).

    gamma = beta * gamma_beta_ratio; w is the chosen and l the rejected completion. |y| is the number of tokens of y.
    """
    deltas = measures.chosen.mean_logps - measures.rejected.mean_logps
    return -logsigmoid(objective.beta * (deltas - objective.gamma_beta_ratio))


# --- single completions --------------------------------------------------------------------


@loss
def supervised(objective: o.Supervised, measures: Measures) -> Tensor:
    """Returns the loss of each group (a prompt with its completions), [G] for G groups: -log pi(w), summed over the
    tokens of its completion w."""
    return -measures.chosen.logps


@loss
def kto(objective: o.Kto, measures: Measures) -> Tensor:
    """Returns KTO's loss of each group (a prompt with its completions), [G] for G groups: the mean of the losses of its
    completions; arXiv 2402.01306.

    A desirable completion has the loss lambda_D (1 - sigmoid(beta (h - z0))). An undesirable one has the loss lambda_U
    (1 - sigmoid(beta (z0 - h))). h is the log-ratio of the completion; `kl_estimate` computes z0. lambda_D and lambda_U
    are the objective's weights of desirable and undesirable completions.
    """
    h = measures.all.logratios
    z0 = kl_estimate(measures)
    good = 1 - (objective.beta * (h - z0)).sigmoid()
    bad = 1 - (objective.beta * (z0 - h)).sigmoid()
    values = torch.where(measures.ratings > 0, objective.desirable_weight * good, objective.undesirable_weight * bad)
    rated = ~measures.ratings.isnan()
    return measures.group_sums(values * rated) / measures.group_sums(rated.to(h.dtype))


def kl_estimate(measures: Measures) -> Tensor:
    """Returns z0 of KTO, an estimate of KL(policy || reference) without a gradient. The estimate needs completions in
    the global batch that were added to a group (a prompt with its completions) although they answer the prompt of
    another group. z0 is the mean log-ratio of these completions, or 0 if this mean is negative."""
    is_of_other_prompt = measures.ratings.isnan()
    h = measures.all.logratios.detach()
    return ((h * is_of_other_prompt).sum() / is_of_other_prompt.sum().clamp(min=1)).clamp(min=0)


def bco(objective: o.Bco, measures: Measures, statistics: Statistics) -> Tensor:
    """Returns the loss of each group (a prompt with its completions), [G] for G groups: the sum of the losses of its
    completions.

    The loss of a good completion is -log sigmoid(beta h - d), that of a bad one -log sigmoid(-(beta h - d)). h is the
    log-ratio of the completion. d is the mean of all rewards (beta h) so far in the run; `statistics` holds this mean,
    and the function updates it.
    """
    rewards = objective.beta * measures.all.logratios
    rated = ~measures.ratings.isnan()
    delta = statistics.add(rewards.detach()[rated])
    values = torch.where(measures.ratings > 0, -logsigmoid(rewards - delta), -logsigmoid(delta - rewards))
    return measures.group_sums(values * rated)


# --- reward models -------------------------------------------------------------------------


@loss
def reward_bradley_terry(objective: o.RewardBradleyTerry, measures: Measures) -> Tensor:
    """Returns the loss of each group (a prompt with its completions), [G] for G groups: the mean of -log sigmoid(r_w -
    r_l - m); arXiv 2410.01257.

    The mean is over all pairs of a better (w) and a worse (l) completion of the group. r_w and r_l are the rewards of
    these two completions, and m is the group's margin.
    """
    leads = differences(measures.by_group(measures.rewards, 0.0)) - measures.margins[:, None, None]
    return _mean_over_pairs(-logsigmoid(leads), measures)


@loss
def reward_regression(objective: o.RewardRegression, measures: Measures) -> Tensor:
    """Returns the loss of each group (a prompt with its completions), [G] for G groups: the mean of (r - rating)^2 over
    its completions; arXiv 2410.01257. r is the reward of a completion."""
    errors = (measures.rewards - measures.ratings) ** 2
    return measures.group_sums(errors) / measures.group_sums(torch.ones_like(errors))


@loss
def reward_gaussian(objective: o.RewardGaussian, measures: Measures) -> Tensor:
    """Returns the loss of each group (a prompt with its completions), [G] for G groups: the mean of -log Phi((m_w -
    m_l) / sqrt(v_w + v_l)).

    The mean is over all pairs of a better (w) and a worse (l) completion of the group. m and v are the mean and the
    variance that the model gives for a completion's reward. Phi(...) is the probability that the Gaussian reward of w
    exceeds that of l. The code of HPSv3 instead draws rewards at random and averages -log sigmoid(r_w - r_l).
    """
    log_variances = measures.by_group(measures.log_variances, 0.0)
    log_sums = torch.logaddexp(log_variances[:, :, None], log_variances[:, None, :])
    leads = differences(measures.by_group(measures.rewards, 0.0)) * (-log_sums / 2).exp()
    logps = torch.special.log_ndtr(leads.double()).to(leads.dtype)  # in float32, far below 0, the gradient cancels
    return _mean_over_pairs(-logps, measures)


def _mean_over_pairs(values: Tensor, measures: Measures) -> Tensor:
    """Returns a mean of `values` [G, k, k] for each of G groups (prompts with their completions), [G]. The mean is over
    the pairs (i, j) of the group's completions in which j is rated lower than i."""
    return (values * measures.worse).sum((1, 2)) / measures.worse.sum((1, 2))


# --- sums ----------------------------------------------------------------------------------


def mpo(objective: o.Mpo, measures: Measures, statistics: Statistics) -> Tensor:
    """Returns the loss of each group (a prompt with its completions), [G] for G groups: sum_i weight_i loss_i, over the
    objectives i that `objective` combines. `statistics` has the mean of all rewards so far in the run, which some of
    these objectives need and update."""
    total = torch.zeros(len(measures.groups), dtype=measures.table.dtype, device=measures.table.device)
    for weight, part in zip(objective.weights, objective.objectives, strict=True):
        is_supervised = isinstance(part, o.Supervised)  # in a sum its loss is a mean over the tokens of the completion
        loss_per_group = -measures.chosen.mean_logps if is_supervised else losses(part, measures, statistics)
        total = total + weight * loss_per_group
    return total


# --- global batches ------------------------------------------------------------------------


def denominator(objective: o.Objective, groups: Sequence[EncodedGroup]) -> int:
    """Returns the number by which the summed losses of a global batch are divided. For the objective `supervised` it is
    the number of tokens that count in the loss; for any other objective, the number of groups (prompts with their
    completions)."""
    if isinstance(objective, o.Supervised):
        return sum(sum(group.num_learned) for group in groups)
    return len(groups)


def check_groups(objective: o.Objective, groups: Sequence[EncodedGroup]) -> None:
    """Raises ValueError if the objective cannot learn from one of the groups (prompts with their completions) of the
    global batch `groups`.

    Some objectives, such as kto, also need completions that were added from other groups, and so answer another prompt.
    For such an objective, raises ValueError if no group has such a completion.
    """
    for group in groups:
        if problem := _problem(objective, group):
            raise ValueError(f"Line {group.line} {problem}")
    if objective.traits.needs_other_prompts and all(len(g.rated()) == len(g.completion_ids) for g in groups):
        raise ValueError(
            f"The batch has no completions of other prompts, which the method '{objective.type}' needs; "
            "add completions of other prompts to the groups, with the rating nan, which marks them."
        )


def _problem(objective: o.Objective, group: EncodedGroup) -> str | None:
    """Returns the reason why the objective cannot learn from the group (a prompt with its completions). Returns None if
    it can.

    An example is "has 1 completions; the method 'dpo' needs at least 2." The caller puts "Line" and the line number of
    the group in front of this text.
    """
    traits = objective.traits
    unpaired = "unpaired" in traits.learns_from
    ratings, rated = group.ranked(), group.rated()
    if len(rated) < len(ratings) and not (unpaired or traits.needs_other_prompts):
        return (
            f"has a completion with the rating nan (from another prompt), which '{objective.type}' cannot use; "
            "leave the completion out."
        )
    from_ratings = traits.learns_from == ("ratings",)
    if from_ratings and group.ratings is None:
        return f"has no ratings; '{objective.type}' learns only from ratings, so give each completion a rating."
    if from_ratings and not all(map(math.isfinite, rated)):
        return f"has the ratings {rated}; the method '{objective.type}' needs finite numbers."
    counts = f"has {len(rated)} completions; the method '{objective.type}' needs"
    if traits.learns_from == ("demonstrations",) and len(rated) != 1:
        return f"{counts} exactly 1."
    if traits.learns_from == ("pairs",) and len(rated) != 2:
        return f"{counts} exactly 2."
    if "rankings" in traits.learns_from and len(rated) < 2:
        return f"{counts} at least 2."
    if unpaired and not rated:
        return f"{counts} at least 1."
    if list(ratings[: len(rated)]) != (rated if unpaired else sorted(rated, reverse=True)):
        return (
            "has completions in the wrong order; "
            "put the one with the highest rating first, and any with the rating nan last."
        )
    if not (unpaired or from_ratings) and len(set(rated)) == 1 < len(rated):
        return "has the same rating for all completions, so none is preferred; leave the row out."
    if group.margin and not (traits.takes_margins and len(rated) == 2):
        return f"has a margin, which '{objective.type}' cannot use with {len(rated)} completions; remove the margin."
    if traits.needs_reference and group.ref_logps is None:
        return (
            "has no ref_logps (log-probabilities under the reference); "
            "compute them with score_reference before training."
        )
    if traits.needs_reference_heads and group.ref_head_logps is None:
        return (
            "has no ref_head_logps (log-probabilities under the reference); "
            "compute them with score_reference before training."
        )
    return None

"""One function per objective, and the table that names them.

A function gives one loss per group, [G]. The loss of a step is their mean over the global batch, each
times its group's weight, however the batch was cut into packs and dealt to ranks; of `supervised`
it is the mean over the batch's tokens. h is log pi(y|x) - log pi_ref(y|x), `w` the chosen completion,
`l` the rejected.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, softplus

from dpo_core import options as o
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.policy.scores import Completions, Scores

NEVER = -1e30  # a reward so low that its exponential is 0, and whose gradient is not nan
LARGEST_EXPONENT = 80.0  # of e in float32


class Statistics:
    """Running statistics of an objective, kept in checkpoints: the mean of all rewards so far."""

    def __init__(self, mean: float = 0.0, count: float = 0.0) -> None:
        self.mean = mean
        self.count = count

    def add(self, rewards: Tensor) -> float:
        self.count += len(rewards)
        self.mean += (rewards.mean().item() - self.mean) * len(rewards) / self.count
        return self.mean


def losses(objective: o.Objective, scores: Scores, statistics: Statistics) -> Tensor:
    """[G] by the objective's own function. `statistics` is changed by those that keep some."""
    if isinstance(objective, o.Mpo):
        return mpo(objective, scores, statistics)
    if isinstance(objective, o.Bco):
        return bco(objective, scores, statistics)
    found: Tensor = LOSSES[objective.type](objective, scores)
    return found


# --- rankings ------------------------------------------------------------------------------


def dpo(objective: o.Dpo, scores: Scores) -> Tensor:
    """-sum_i log[e^{beta h_i} / (e^{beta h_i} + sum_{j worse than i} e^{beta h_j})]; arXiv 2305.18290, A.3.

    Of a pair this is -log sigmoid(beta (h_w - h_l)), equation 7. A tie says nothing about its members.
    """
    rewards = scores.by_group(objective.beta * scores.all.logratios, NEVER)
    rivals = rewards[:, None, :].masked_fill(~scores.worse, NEVER).logsumexp(2) + scores.margins[:, None]
    chosen_from = scores.worse.any(2)  # the worst completion is the only one left
    found = (softplus(rivals - rewards) * chosen_from).sum(1)
    return found / chosen_from.sum(1) if objective.mean_over_choices else found


def lipo(objective: o.Lipo, scores: Scores) -> Tensor:
    """sum over i better than j of |G_i - G_j| |1/D_i - 1/D_j| log(1 + e^{-(s_i - s_j)}); arXiv 2402.01878.

    s = beta h, G = 2^psi - 1, D = log(1 + rank by s); psi is the group's ratings between 0 and 1.
    """
    s = scores.by_group(objective.beta * scores.all.logratios, NEVER)
    ratings = scores.by_group(scores.ratings, math.nan)
    lowest = ratings.nan_to_num(math.inf).amin(1, keepdim=True)
    highest = ratings.nan_to_num(-math.inf).amax(1, keepdim=True)
    gains = 2 ** ((ratings - lowest) / (highest - lowest)).nan_to_num(0.0) - 1
    ranks = s.detach().argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    discounts = 1 / torch.log1p(ranks.to(s.dtype))
    weights = differences(gains).abs() * differences(discounts).abs() * scores.worse
    return (weights * softplus(-differences(s))).sum((1, 2))


def differences(values: Tensor) -> Tensor:
    """[G, k] to [G, k, k]: of i over j."""
    return values[:, :, None] - values[:, None, :]


# --- pairs, against the reference ----------------------------------------------------------


def _deltas(scores: Scores) -> Tensor:
    return scores.chosen.logratios - scores.rejected.logratios


def cdpo(objective: o.Cdpo, scores: Scores) -> Tensor:
    """(1 - eps) (-log sigmoid(beta delta)) + eps (-log sigmoid(-beta delta))."""
    return _smoothed(objective.beta * _deltas(scores), objective.label_smoothing)


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def robust_dpo(objective: o.RobustDpo, scores: Scores) -> Tensor:
    """[(1 - eps) l(delta) - eps l(-delta)] / (1 - 2 eps), l = -log sigmoid(beta .)."""
    eps, logits = objective.label_smoothing, objective.beta * _deltas(scores)
    return (eps * logsigmoid(-logits) - (1 - eps) * logsigmoid(logits)) / (1 - 2 * eps)


def ipo(objective: o.Ipo, scores: Scores) -> Tensor:
    """(delta - 1 / (2 tau))^2, delta per token unless summed."""
    chosen, rejected = scores.chosen, scores.rejected
    delta = (
        chosen.mean_logratios - rejected.mean_logratios
        if objective.length_average
        else chosen.logratios - rejected.logratios
    )
    return (delta - 1 / (2 * objective.beta)) ** 2


def hinge(objective: o.Hinge, scores: Scores) -> Tensor:
    """max(0, 1 - beta delta)."""
    return relu(1 - objective.beta * _deltas(scores))


def dpo_norm(objective: o.DpoNorm, scores: Scores) -> Tensor:
    """-log sigmoid(beta (h_w / |w| - h_l / |l|))."""
    return -logsigmoid(objective.beta * (scores.chosen.mean_logratios - scores.rejected.mean_logratios))


def apo_zero(objective: o.ApoZero, scores: Scores) -> Tensor:
    """1 - sigmoid(beta h_w) + sigmoid(beta h_l)."""
    chosen, rejected = objective.beta * scores.chosen.logratios, objective.beta * scores.rejected.logratios
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down(objective: o.ApoDown, scores: Scores) -> Tensor:
    """sigmoid(beta h_w) + 1 - sigmoid(beta delta)."""
    return (objective.beta * scores.chosen.logratios).sigmoid() + 1 - (objective.beta * _deltas(scores)).sigmoid()


def nca(objective: o.Nca, scores: Scores) -> Tensor:
    """-log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2, r = beta h."""
    chosen, rejected = objective.beta * scores.chosen.logratios, objective.beta * scores.rejected.logratios
    return -logsigmoid(chosen) - logsigmoid(-chosen) / 2 - logsigmoid(-rejected) / 2


def exo(objective: o.Exo, scores: Scores) -> Tensor:
    """KL of (sigmoid(beta delta), sigmoid(-beta delta)) from (1 - eps, eps)."""
    eps, logits = objective.label_smoothing, objective.beta * _deltas(scores)
    chosen = logits.sigmoid() * (logsigmoid(logits) - math.log1p(-eps))
    return chosen + (-logits).sigmoid() * (logsigmoid(-logits) - math.log(eps))


def sppo(objective: o.Sppo, scores: Scores) -> Tensor:
    """(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2."""
    half = 0.5 / objective.beta
    return (scores.chosen.logratios - half) ** 2 + (scores.rejected.logratios + half) ** 2


def aot(objective: o.Aot, scores: Scores) -> Tensor:
    """-log sigmoid(beta (u_(i) - v_(i))), u and v sorted over the global batch.

    Paired, u is log pi(w) - log pi(l) of the policy and v of the reference; else u is h_w and v is h_l.
    A group of weight 2 stands there as two groups of weight 1 do: quantiles are those of weighted values.
    """
    chosen, rejected = scores.chosen, scores.rejected
    if objective.paired:
        assert chosen.ref_logps is not None
        assert rejected.ref_logps is not None
        u, v = chosen.logps - rejected.logps, chosen.ref_logps - rejected.ref_logps
    else:
        u, v = chosen.logratios, rejected.logratios
    of_u, of_v, shares = _coupling(u.detach(), v.detach(), scores.weights)
    parts = shares * _smoothed(objective.beta * (u[of_u] - v[of_v]), objective.label_smoothing)
    return torch.zeros_like(u).index_add(0, of_u, parts)


def _coupling(u: Tensor, v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal transport on a line: quantiles meet. [2G] places in u and in v, and the share of the weight of u's
    place that goes to v's. Both have the same [G] weights."""
    weights = weights.double()
    u_order, v_order = u.argsort(), v.argsort()
    u_edges, v_edges = weights[u_order].cumsum(0), weights[v_order].cumsum(0)
    edges = torch.cat([u_edges, v_edges]).sort().values
    last = len(weights) - 1
    of_u = u_order[torch.searchsorted(u_edges, edges).clamp(max=last)]
    of_v = v_order[torch.searchsorted(v_edges, edges).clamp(max=last)]
    return of_u, of_v, (edges.diff(prepend=edges.new_zeros(1)) / weights[of_u]).to(u.dtype)


def discopop(objective: o.Discopop, scores: Scores) -> Tensor:
    """(1 - m) (-log sigmoid(r)) + m e^{-r}, m = sigmoid(r / tau), r = beta delta."""
    logits = objective.beta * _deltas(scores)
    mix = (logits / objective.tau).sigmoid()
    return -(1 - mix) * logsigmoid(logits) + mix * (-logits).clamp(max=LARGEST_EXPONENT).exp()


def dpop(objective: o.Dpop, scores: Scores) -> Tensor:
    """-log sigmoid(beta (delta - lambda max(0, -h_w)))."""
    penalty = objective.penalty * relu(-scores.chosen.logratios)
    return -logsigmoid(objective.beta * (_deltas(scores) - penalty))


def rpo(objective: o.Rpo, scores: Scores) -> Tensor:
    """-log sigmoid(beta delta) - alpha log pi(w) / |w|."""
    return -logsigmoid(objective.beta * _deltas(scores)) - objective.nll_weight * scores.chosen.mean_logps


def ld_dpo(objective: o.LdDpo, scores: Scores) -> Tensor:
    """-log sigmoid(beta delta), tokens past the shorter length counting alpha in policy and reference."""

    def logratios(side: Completions) -> Tensor:
        assert side.ref_head_logps is not None
        head = side.head_logps - side.ref_head_logps
        return head + objective.tail_weight * (side.logratios - head)

    return -logsigmoid(objective.beta * (logratios(scores.chosen) - logratios(scores.rejected)))


def r_dpo(objective: o.RDpo, scores: Scores) -> Tensor:
    """-log sigmoid(beta delta + alpha (|w| - |l|))."""
    longer = scores.chosen.lengths - scores.rejected.lengths
    return -logsigmoid(objective.beta * _deltas(scores) + objective.length_weight * longer)


def f_dpo(objective: o.FDpo, scores: Scores) -> Tensor:
    """-log sigmoid(beta (f'(e^{h_w}) - f'(e^{h_l}))); constants of f' cancel."""

    def slope(h: Tensor) -> Tensor:
        if objective.divergence == "jensen_shannon":
            return logsigmoid(h)
        alpha = 1.0 if objective.divergence == "forward_kl" else objective.alpha
        return -(-alpha * h).clamp(max=LARGEST_EXPONENT).exp() / alpha

    return -logsigmoid(objective.beta * (slope(scores.chosen.logratios) - slope(scores.rejected.logratios)))


# --- pairs, without reference --------------------------------------------------------------


def orpo(objective: o.Orpo, scores: Scores) -> Tensor:
    """-log pi(w) / |w| - lambda log sigmoid(log odds(w) - log odds(l)), odds of the mean log-probabilities."""
    chosen, rejected = scores.chosen.mean_logps, scores.rejected.mean_logps
    return -chosen - objective.odds_weight * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, exact and with a finite gradient as p nears 0 or 1."""
    logps = logps.clamp(max=-1e-6)
    near_one = logps > -math.log(2)
    log_rest = torch.where(near_one, torch.log(-torch.expm1(logps)), torch.log1p(-logps.exp()))
    return logps - log_rest


def cpo(objective: o.Cpo, scores: Scores) -> Tensor:
    """-log sigmoid(beta (log pi(w) - log pi(l))) - alpha log pi(w)."""
    likelihood = scores.chosen.mean_logps if objective.length_average else scores.chosen.logps
    deltas = scores.chosen.logps - scores.rejected.logps
    return -logsigmoid(objective.beta * deltas) - objective.nll_weight * likelihood


def simpo(objective: o.Simpo, scores: Scores) -> Tensor:
    """-log sigmoid(beta (log pi(w) / |w| - log pi(l) / |l|) - gamma), gamma = beta * gamma_beta_ratio."""
    deltas = scores.chosen.mean_logps - scores.rejected.mean_logps
    return -logsigmoid(objective.beta * (deltas - objective.gamma_beta_ratio))


# --- single completions --------------------------------------------------------------------


def supervised(objective: o.Supervised, scores: Scores) -> Tensor:
    """-log pi(y|x), of the best completion."""
    return -scores.chosen.logps


def kto(objective: o.Kto, scores: Scores) -> Tensor:
    """lambda_D (1 - sigmoid(beta (h - z0))) or lambda_U (1 - sigmoid(beta (z0 - h))); arXiv 2402.01306.

    z0 is the mean h of completions under other prompts over the global batch, at least 0, without
    gradient. A group of several completions counts as one, their mean.
    """
    h = scores.all.logratios
    z0 = kl_estimate(scores)
    good = 1 - (objective.beta * (h - z0)).sigmoid()
    bad = 1 - (objective.beta * (z0 - h)).sigmoid()
    values = torch.where(scores.ratings > 0, objective.desirable_weight * good, objective.undesirable_weight * bad)
    rated = ~scores.ratings.isnan()
    return scores.group_sums(values * rated) / scores.group_sums(rated.to(h.dtype))


def kl_estimate(scores: Scores) -> Tensor:
    """KTO's z0."""
    of_other_prompts = scores.ratings.isnan()
    h = scores.all.logratios.detach()
    return ((h * of_other_prompts).sum() / of_other_prompts.sum().clamp(min=1)).clamp(min=0)


def bco(objective: o.Bco, scores: Scores, statistics: Statistics) -> Tensor:
    """-log sigmoid(beta h_w - delta), -log sigmoid(-(beta h_l - delta)), delta the mean of all rewards so far."""
    rewards = objective.beta * scores.all.logratios
    rated = ~scores.ratings.isnan()
    delta = statistics.add(rewards.detach()[rated])
    values = torch.where(scores.ratings > 0, -logsigmoid(rewards - delta), -logsigmoid(delta - rewards))
    return scores.group_sums(values * rated)


# --- reward models -------------------------------------------------------------------------


def reward_bradley_terry(objective: o.RewardBradleyTerry, scores: Scores) -> Tensor:
    """-log sigmoid(r_w - r_l - m), m the margin, a mean over the pairs that the group orders; arXiv 2410.01257."""
    leads = differences(scores.by_group(scores.rewards, 0.0)) - scores.margins[:, None, None]
    return _mean_over_pairs(-logsigmoid(leads), scores)


def reward_regression(objective: o.RewardRegression, scores: Scores) -> Tensor:
    """(r - rating)^2, a mean over the group's completions; arXiv 2410.01257."""
    errors = (scores.rewards - scores.ratings) ** 2
    return scores.group_sums(errors) / scores.group_sums(torch.ones_like(errors))


def reward_gaussian(objective: o.RewardGaussian, scores: Scores) -> Tensor:
    """-log Phi((m_w - m_l) / sqrt(v_w + v_l)), a mean over the pairs that the group orders: the probability that
    one Gaussian reward exceeds the other. HPSv3's code samples the mean of -log sigmoid(r_w - r_l) instead."""
    log_variances = scores.by_group(scores.log_variances, 0.0)
    log_sums = torch.logaddexp(log_variances[:, :, None], log_variances[:, None, :])
    leads = differences(scores.by_group(scores.rewards, 0.0)) * (-log_sums / 2).exp()
    logps = torch.special.log_ndtr(leads.double()).to(leads.dtype)  # whose gradient cancels in float32, far below 0
    return _mean_over_pairs(-logps, scores)


def _mean_over_pairs(values: Tensor, scores: Scores) -> Tensor:
    """[G, k, k] to [G], over the completions j that are rated lower than i."""
    return (values * scores.worse).sum((1, 2)) / scores.worse.sum((1, 2))


# --- sums ----------------------------------------------------------------------------------


def mpo(objective: o.Mpo, scores: Scores, statistics: Statistics) -> Tensor:
    """sum_i weight_i loss_i."""
    total = torch.zeros(len(scores.groups), dtype=scores.found.dtype, device=scores.found.device)
    for weight, part in zip(objective.weights, objective.objectives, strict=True):
        mean_likelihood = isinstance(part, o.Supervised)
        found = -scores.chosen.mean_logps if mean_likelihood else losses(part, scores, statistics)
        total = total + weight * found
    return total


# --- the table -----------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Any, Scores], Tensor]] = {
    function.__name__: function
    for function in (
        supervised, dpo, cdpo, robust_dpo, ipo, hinge, dpo_norm, kto, orpo, cpo, simpo, apo_zero, apo_down, nca, exo,
        sppo, aot, discopop, dpop, rpo, ld_dpo, r_dpo, f_dpo, lipo, reward_bradley_terry, reward_regression,
        reward_gaussian,
    )
}  # fmt: skip


def count_units(objective: o.Objective, groups: Sequence[EncodedGroup]) -> int:
    """What the sum of losses is divided by."""
    if isinstance(objective, o.Supervised):
        return sum(sum(group.num_learned) for group in groups)
    return len(groups)


def check_groups(objective: o.Objective, groups: Sequence[EncodedGroup]) -> None:
    """Raises ValueError for a global batch, or for its first group, that the objective cannot learn from."""
    for group in groups:
        if problem := _problem(objective, group):
            raise ValueError(f"Line {group.line} {problem}")
    if objective.traits.needs_other_prompts and all(len(g.rated()) == len(g.completion_ids) for g in groups):
        raise ValueError(
            f"The global batch has no completions of other prompts, which {objective.type} needs; add some, rated nan."
        )


def _problem(objective: o.Objective, group: EncodedGroup) -> str | None:
    traits = objective.traits
    unpaired = "unpaired" in traits.learns_from
    ratings, rated = group.ranked(), group.rated()
    if len(rated) < len(ratings) and not (unpaired or traits.needs_other_prompts):
        return f"rates a completion nan; {objective.type} takes none of other prompts."
    from_ratings = traits.learns_from == ("ratings",)
    if from_ratings and group.ratings is None:
        return f"has no ratings; {objective.type} learns nothing else."
    if from_ratings and not all(map(math.isfinite, rated)):
        return f"has ratings {rated}; {objective.type} takes finite ones."
    many = f"has {len(rated)} completions; {objective.type} takes"
    if traits.learns_from == ("demonstrations",) and len(rated) != 1:
        return f"{many} 1."
    if traits.learns_from == ("pairs",) and len(rated) != 2:
        return f"{many} 2."
    if "rankings" in traits.learns_from and len(rated) < 2:
        return f"{many} at least 2."
    if unpaired and not rated:
        return f"{many} at least 1."
    if list(ratings[: len(rated)]) != (rated if unpaired else sorted(rated, reverse=True)):
        return "has its completions out of order; put the best first, those rated nan last."
    if not (unpaired or from_ratings) and len(set(rated)) == 1 < len(rated):
        return "rates all its completions alike; leave it out, it prefers none."
    if group.margin and not (traits.takes_margins and len(rated) == 2):
        return f"has a margin; {objective.type} takes none here."
    if traits.needs_reference and group.ref_logps is None:
        return "has no ref_logps; score it with the reference before training."
    if traits.needs_reference_heads and group.ref_head_logps is None:
        return "has no ref_head_logps; score it with the reference before training."
    return None

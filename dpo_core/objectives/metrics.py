"""Computes the metrics of a training step, such as rewards, margins, accuracies and lengths. The metrics are means over
the global batch, in which all groups (prompts with their completions) have the same weight.

The metrics have the names under which TRL logs them.
"""

import math

from torch import Tensor

from dpo_core import options as o
from dpo_core.objectives.losses import differences, kl_estimate
from dpo_core.policy.measures import Measures


def compute_metrics(objective: o.Objective, measures: Measures) -> dict[str, Tensor]:
    """Returns the metrics of the groups in `measures` as scalars, by name. A group is a prompt with its completions. If
    a group has more than two completions, metrics of `chosen` are those of the best completion, and metrics of
    `rejected` are means over the others."""
    if isinstance(objective, o.Supervised):
        return {"mean_token_accuracy": measures.num_correct.sum() / measures.all.lengths.sum()}
    if objective.traits.num_outputs:
        return _reward_model_metrics(objective, measures)
    sides = _sides(objective, measures)
    rewards = _rewards(objective, measures)
    values = {"rewards": rewards, "logps": measures.all.logps, "lengths": measures.all.lengths}
    if measures.all.ref_logps is not None:
        values["logratios"] = measures.all.logratios  # how far the policy has moved from the reference
    metrics = {
        f"{name}/{side}": value[places].mean() for name, value in values.items() for side, places in sides.items()
    }
    if measures.all.ref_logps is not None:
        metrics["kl"] = _kl(objective, measures)
    if len(sides) == 2:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if _has_ordered_pair(measures):
        leads = differences(measures.by_group(rewards, 0.0))
        metrics["rewards/accuracies"] = _mean_over_pairs(leads > 0, measures)
    return metrics


def _reward_model_metrics(objective: o.Objective, measures: Measures) -> dict[str, Tensor]:
    """Returns the metrics of a reward model by name. Margin and accuracy are means over all pairs of completions of the
    same prompt that have different ratings. Without such a pair, the two are left out."""
    rewards = measures.rewards
    metrics = {"min_reward": rewards.min(), "mean_reward": rewards.mean(), "max_reward": rewards.max()}
    if objective.traits.num_outputs == 2:
        metrics["mean_variance"] = measures.log_variances.exp().mean()
    if _has_ordered_pair(measures):
        leads = differences(measures.by_group(rewards, 0.0))
        metrics |= {"accuracy": _mean_over_pairs(leads > 0, measures), "margin": _mean_over_pairs(leads, measures)}
    return metrics


def _has_ordered_pair(measures: Measures) -> bool:
    return any(len(set(group.rated())) > 1 for group in measures.groups)


def _mean_over_pairs(values: Tensor, measures: Measures) -> Tensor:
    """Returns the mean of `values` [G, k, k], for G groups with k completions each. The mean is over all groups, and
    over the pairs (i, j) of a group's completions in which j is rated lower than i."""
    return (values * measures.worse).sum(dtype=measures.table.dtype) / measures.worse.sum()


def _sides(objective: o.Objective, measures: Measures) -> dict[str, Tensor]:
    """Returns which completions are chosen and which are rejected: two tensors of row numbers, under the keys `chosen`
    and `rejected`. A row number is the number of a completion's row in `measures.table`, which has one row for each
    completion. A key without rows is left out."""
    unpaired = "unpaired" in objective.traits.learns_from
    sides: dict[str, list[int]] = {"chosen": [], "rejected": []}
    completions = (completion for group in measures.groups for completion in enumerate(group.ranked()))
    for place, (rank, rating) in enumerate(completions):
        if not math.isnan(rating):
            is_chosen = rating > 0 if unpaired else rank == 0
            sides["chosen" if is_chosen else "rejected"].append(place)
    return {side: measures.places(places) for side, places in sides.items() if places}


def _kl(objective: o.Objective, measures: Measures) -> Tensor:
    """Returns an estimate of the KL divergence between policy and reference. For KTO the estimate is that of
    `kl_estimate`. For other objectives it is the mean of -h, where h is a completion's log-ratio; this is KL(reference
    || policy) if the reference wrote the completions."""
    if isinstance(objective, o.Kto):
        return kl_estimate(measures)
    rated = ~measures.ratings.isnan()
    return -(measures.all.logratios * rated).sum() / rated.sum()


def _rewards(objective: o.Objective, measures: Measures) -> Tensor:
    """Returns the reward of each of K completions, [K]: beta times the log-ratio. For objectives without a reference,
    the log-probability takes the place of the log-ratio. For ORPO, `odds_weight` takes the place of beta. For `mpo`,
    the rewards are those of its first objective that is not `supervised`."""
    if isinstance(objective, o.Mpo):
        return _rewards(next(part for part in objective.objectives if part.type != "supervised"), measures)
    assert not isinstance(objective, o.Supervised | o.RewardObjective)
    scale = objective.odds_weight if isinstance(objective, o.Orpo) else objective.beta
    rewards: Tensor = scale * getattr(measures.all, objective.traits.reward)
    return rewards

"""Rewards, margins, accuracies, lengths: plain means over the global batch, named as TRL logs them."""

import math

from torch import Tensor

from dpo_core import options as o
from dpo_core.objectives.losses import differences, kl_estimate
from dpo_core.policy.scores import Scores


def measure(objective: o.Objective, scores: Scores) -> dict[str, Tensor]:
    """Scalars by key. Of a ranking, `chosen` is the best completion and `rejected` the mean of the others."""
    if isinstance(objective, o.Supervised):
        return {"mean_token_accuracy": scores.num_correct.sum() / scores.all.lengths.sum()}
    if objective.traits.num_outputs:
        return _measure_rewards(objective, scores)
    sides = _sides(objective, scores)
    rewards = _rewards(objective, scores)
    values = {"rewards": rewards, "logps": scores.all.logps, "lengths": scores.all.lengths}
    if scores.all.ref_logps is not None:
        values["logratios"] = scores.all.logratios  # their drift from the reference
    found = {f"{name}/{side}": value[places].mean() for name, value in values.items() for side, places in sides.items()}
    if scores.all.ref_logps is not None:
        found["kl"] = _kl(objective, scores)
    if len(sides) == 2:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    if _some_order(scores):
        leads = differences(scores.by_group(rewards, 0.0))
        found["rewards/accuracies"] = _mean_over_pairs(leads > 0, scores)
    return found


def _measure_rewards(objective: o.Objective, scores: Scores) -> dict[str, Tensor]:
    """Of a reward model. The margin is a mean over ordered pairs, as the accuracy is."""
    rewards = scores.rewards
    found = {"min_reward": rewards.min(), "mean_reward": rewards.mean(), "max_reward": rewards.max()}
    if objective.traits.num_outputs == 2:
        found["mean_variance"] = scores.log_variances.exp().mean()
    if _some_order(scores):
        leads = differences(scores.by_group(rewards, 0.0))
        found |= {"accuracy": _mean_over_pairs(leads > 0, scores), "margin": _mean_over_pairs(leads, scores)}
    return found


def _some_order(scores: Scores) -> bool:
    return any(len(set(group.rated())) > 1 for group in scores.groups)


def _mean_over_pairs(values: Tensor, scores: Scores) -> Tensor:
    """Of [G, k, k], over all j that are rated lower than i."""
    return (values * scores.worse).sum(dtype=scores.found.dtype) / scores.worse.sum()


def _sides(objective: o.Objective, scores: Scores) -> dict[str, Tensor]:
    """Where the completions of each side stand. A side without any is left out."""
    unpaired = "unpaired" in objective.traits.learns_from
    sides: dict[str, list[int]] = {"chosen": [], "rejected": []}
    completions = (completion for group in scores.groups for completion in enumerate(group.ranked()))
    for place, (rank, rating) in enumerate(completions):
        if not math.isnan(rating):
            ahead = rating > 0 if unpaired else rank == 0
            sides["chosen" if ahead else "rejected"].append(place)
    return {side: scores.places(places) for side, places in sides.items() if places}


def _kl(objective: o.Objective, scores: Scores) -> Tensor:
    """KTO's estimate; else KL(reference || policy), were the completions the reference's own."""
    if isinstance(objective, o.Kto):
        return kl_estimate(scores)
    rated = ~scores.ratings.isnan()
    return -(scores.all.logratios * rated).sum() / rated.sum()


def _rewards(objective: o.Objective, scores: Scores) -> Tensor:
    if isinstance(objective, o.Mpo):
        return _rewards(next(part for part in objective.objectives if part.type != "supervised"), scores)
    if isinstance(objective, o.Orpo):
        return objective.odds_weight * scores.all.mean_logps
    if isinstance(objective, o.Simpo):
        return objective.beta * scores.all.mean_logps
    if isinstance(objective, o.Cpo):
        return objective.beta * scores.all.logps
    assert not isinstance(objective, o.Supervised | o.RewardObjective)
    return objective.beta * scores.all.logratios

"""Rewards, margins, accuracies, lengths: plain means over the global batch, named as TRL logs them."""

import math

from torch import Tensor

from dpo_core import options as o
from dpo_core.objectives import kl_estimate
from dpo_core.scores import Scores


def measure(objective: o.Objective, scores: Scores) -> dict[str, Tensor]:
    """Scalars by key. Of a ranking, `chosen` is the best completion and `rejected` the mean of the others."""
    if isinstance(objective, o.Supervised):
        return {"mean_token_accuracy": scores.num_correct.sum() / scores.all.lengths.sum()}
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
    if any(len(set(group.rated())) > 1 for group in scores.groups):
        by_group = scores.by_group(rewards, 0.0)
        ahead = by_group[:, :, None] > by_group[:, None, :]
        found["rewards/accuracies"] = (ahead & scores.worse).sum(dtype=rewards.dtype) / scores.worse.sum()
    return found


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
    assert not isinstance(objective, o.Supervised)
    return objective.beta * scores.all.logratios

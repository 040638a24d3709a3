"""Rewards, margins, accuracies, lengths: plain means over the global batch, named as TRL logs them."""

import torch
from torch import Tensor

from dpo_core import options as o
from dpo_core.objectives import kl_estimate
from dpo_core.scores import Scores


def measure(objective: o.Objective, scores: Scores) -> dict[str, Tensor]:
    """Scalars by key. Of a ranking, `chosen` is the best completion and `rejected` the mean of the others."""
    if isinstance(objective, o.Supervised):
        return {"mean_token_accuracy": scores.num_correct.sum() / scores.all.lengths.sum()}
    rated = ~scores.ratings.isnan()
    chosen, rejected = _sides(objective, scores, rated)
    rewards = _rewards(objective, scores)
    values = {"rewards": rewards, "logps": scores.all.logps, "lengths": scores.all.lengths}
    if scores.all.ref_logps is not None:
        values["logratios"] = scores.all.logratios  # their drift from the reference
    found = {
        f"{name}/{side}": value[which].mean()
        for name, value in values.items()
        for side, which in (("chosen", chosen), ("rejected", rejected))
        if which.any()
    }
    if scores.all.ref_logps is not None:
        # KL(reference || policy), were the completions the reference's own
        found["kl"] = kl_estimate(scores) if isinstance(objective, o.Kto) else -scores.all.logratios[rated].mean()
    if chosen.any() and rejected.any():
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    better = scores.by_group(scores.ratings, torch.nan)
    ahead = scores.by_group(rewards, 0.0)
    ordered = better[:, :, None] > better[:, None, :]
    if ordered.any():
        found["rewards/accuracies"] = (ahead[:, :, None] > ahead[:, None, :])[ordered].to(rewards.dtype).mean()
    return found


def _sides(objective: o.Objective, scores: Scores, rated: Tensor) -> tuple[Tensor, Tensor]:
    if "unpaired" in objective.traits.learns_from:
        return rated & (scores.ratings > 0), rated & (scores.ratings <= 0)
    best = torch.zeros_like(rated)
    best[scores.starts] = True
    return best, rated & ~best


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

"""Rewards, margins, accuracies: one vector of sums per pack, added up over packs and ranks, divided once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_core import config
from dpo_core.batch import Batch
from dpo_core.logps import sum_by_completion

# (its config, batch, token_logps [R], correct [R]) -> sums over the objective's units, one per key.
Measure = Callable[[Any, Batch, Tensor, Tensor], Tensor]


def measure_supervised(objective: config.Supervised, batch: Batch, token_logps: Tensor, correct: Tensor) -> Tensor:
    return correct.sum(dtype=torch.float32)[None]


def measure_dpo(objective: config.Dpo, batch: Batch, token_logps: Tensor, correct: Tensor) -> Tensor:
    assert batch.ref_logps is not None
    logps = sum_by_completion(token_logps, batch.completion_of_row, batch.num_completions)
    rewards = objective.beta * (logps - batch.ref_logps)
    chosen, rejected = batch.group_starts, batch.group_starts + 1
    chosen_rewards, rejected_rewards = rewards[chosen], rewards[rejected]
    values = (
        chosen_rewards,
        rejected_rewards,
        chosen_rewards - rejected_rewards,
        (chosen_rewards > rejected_rewards).to(rewards.dtype),
        logps[chosen],
        logps[rejected],
    )
    return torch.stack(values).sum(1)


# By objective: the keys, named as TRL logs them, and the function that sums their values.
MEASURES: dict[str, tuple[tuple[str, ...], Measure]] = {
    "supervised": (("mean_token_accuracy",), measure_supervised),
    "dpo": (
        (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
        ),
        measure_dpo,
    ),
}

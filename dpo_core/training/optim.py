"""Creates the optimizer, AdamW, and computes the learning rate of each step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from dpo_core.config import Optim


def make_optimizer(parameters: Iterable[nn.Parameter], optim: Optim) -> torch.optim.AdamW:
    """Returns an AdamW optimizer for the parameters, with the weight decay of the options `optim`. Weight decay applies
    only to matrices, not to biases and the weights of norms. The learning rate is 0; the caller sets it at each
    step."""
    stepped = list(parameters)
    groups = [
        {"params": [p for p in stepped if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in stepped if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """Returns the learning rate of step number `step`, counted from 1, of a run with `total_steps` steps. The rate
    rises during the warmup, then follows the schedule in `optim`, and is never 0."""
    assert optim.learning_rate is not None  # `resolved` has set the learning rate
    warmup = math.ceil(optim.warmup_ratio * total_steps)
    if step <= warmup:
        return optim.learning_rate * step / (warmup + 1)
    if optim.schedule == "constant":
        return optim.learning_rate
    left = (total_steps - step + 1) / max(1, total_steps - warmup)
    return optim.learning_rate * (left if optim.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)

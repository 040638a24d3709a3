"""The optimizer, its schedule, and gradients that live in one flat buffer."""

import math

import torch
from torch import Tensor, nn

from dpo_core.config import Optim


def make_optimizer(policy: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW; weights decay, biases and norms do not."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """The rate of `step`, from 1. It rises over the warmup, then falls; no step has the rate 0."""
    assert optim.learning_rate is not None  # resolved
    warmup = math.ceil(optim.warmup_ratio * total_steps)
    if step <= warmup:
        return optim.learning_rate * step / (warmup + 1)
    if optim.schedule == "constant":
        return optim.learning_rate
    left = (total_steps - step + 1) / max(1, total_steps - warmup)
    return optim.learning_rate * (left if optim.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


class Gradients:
    """All gradients as one buffer: autograd adds into views of it, and one call adds it up over ranks."""

    def __init__(self, policy: nn.Module) -> None:
        trained = [p for p in policy.parameters() if p.requires_grad]
        self.flat = torch.zeros(sum(p.numel() for p in trained), dtype=trained[0].dtype, device=trained[0].device)
        for parameter, part in zip(trained, self.flat.split_with_sizes([p.numel() for p in trained]), strict=True):
            parameter.grad = part.view_as(parameter)

    def zero(self) -> None:
        self.flat.zero_()

    def clip(self, max_norm: float) -> Tensor:
        """Scale down to `max_norm`; returns the norm before."""
        norm: Tensor = torch.linalg.vector_norm(self.flat)
        self.flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1))
        return norm

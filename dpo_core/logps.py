"""Hidden states to log-probabilities of completion tokens, without the logits of all rows at once."""

from typing import Any

import torch
from torch import Tensor

# Rows of logits held at a time: on a CPU few enough for its caches, on a GPU enough to fill it.
TILE_ROWS = {"cpu": 256, "cuda": 1024}


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    soft_cap: float | None = None,
    tile_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T + bias)[targets], and whether the target has the largest logit.

    R rows, H width, V vocabulary: hidden [R, H], weight [V, H], bias [V] or None, targets [R];
    both results are [R], the first in float32 or wider, the second without gradient. With a
    `soft_cap` logits are first `soft_cap * tanh(logits / soft_cap)`, as Gemma's are.
    """
    tile = tile_rows or TILE_ROWS.get(hidden.device.type, 1024)
    found: tuple[Tensor, Tensor] = _TiledLogps.apply(hidden, weight, bias, targets, soft_cap, tile)  # type: ignore[no-untyped-call]
    return found


class _TiledLogps(torch.autograd.Function):
    """Holds rows x vocabulary for one tile only. Backward computes each tile's logits again and turns them
    into their gradient in place: d logp / d logits = onehot(target) - softmax(logits)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        soft_cap: float | None,
        tile: int,
    ) -> tuple[Tensor, Tensor]:
        log_normalizers, chosen, correct = [], [], []
        for start in range(0, len(hidden), tile):
            logits = _logits(hidden[start : start + tile], weight, bias, soft_cap)
            at_target = logits.gather(1, targets[start : start + tile, None])[:, 0]
            largest = logits.amax(1)
            log_normalizers.append(logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest))
            chosen.append(at_target)
            correct.append(at_target == largest)
        normalizer = torch.cat(log_normalizers)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        ctx.soft_cap, ctx.tile = soft_cap, tile
        is_correct = torch.cat(correct)
        ctx.mark_non_differentiable(is_correct)
        return torch.cat(chosen) - normalizer, is_correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), ctx.tile):
            tile = slice(start, start + ctx.tile)
            grad = grads[0][tile, None]
            logits = _logits(hidden[tile], weight, bias, ctx.soft_cap)
            cap_slope = None if ctx.soft_cap is None else 1 - (logits / ctx.soft_cap) ** 2
            slope = logits.sub_(normalizer[tile, None]).exp_().mul_(-grad)
            slope.scatter_add_(1, targets[tile, None], grad)
            if cap_slope is not None:
                slope.mul_(cap_slope)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[tile])
            if grad_weight is not None:
                grad_weight.addmm_(slope.T, hidden[tile])
            if grad_bias is not None:
                grad_bias.add_(slope.sum(0))
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, soft_cap: float | None) -> Tensor:
    """A fresh tensor, float32 or wider, that the caller may overwrite."""
    logits = torch.nn.functional.linear(rows, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if soft_cap is None else logits.div_(soft_cap).tanh_().mul_(soft_cap)

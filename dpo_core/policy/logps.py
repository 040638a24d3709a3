"""Hidden states to log-probabilities of completion tokens, without the logits of all rows at once."""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from dpo_core.plan.rules import TILE_COLUMNS, TILE_ROWS

PRODUCT_ROWS = {"cpu": 2048}  # computed before they are added up: so few that caches hold them


def tile_bytes(vocabulary: int, dtype: torch.dtype, device: torch.device, *, capped: bool) -> int:
    """What a full tile of logits takes: in float32, before that in half precision, and thrice to undo a cap."""
    numbers = TILE_ROWS.get(device.type, 1024) * min(vocabulary, TILE_COLUMNS)
    widths = (3 if capped else 1) * torch.float32.itemsize + (dtype.itemsize if dtype.itemsize < 4 else 0)
    return numbers * widths


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    soft_cap: float | None = None,
    tile_rows: int | None = None,
    tile_columns: int = TILE_COLUMNS,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T + bias)[targets], and whether the target has the largest logit.

    R rows, H width, V vocabulary: hidden [R, H], weight [V, H], bias [V] or None, targets [R];
    both results are [R], the first in float32 or wider, the second without gradient. With a
    `soft_cap` logits are first `soft_cap * tanh(logits / soft_cap)`, as Gemma's are.
    """
    tile = (tile_rows or TILE_ROWS.get(hidden.device.type, 1024), tile_columns)
    found: tuple[Tensor, Tensor] = _TiledLogps.apply(hidden, weight, bias, targets, soft_cap, tile)  # type: ignore[no-untyped-call]
    return found


class _TiledLogps(torch.autograd.Function):
    """Holds one tile of rows x vocabulary only. Backward computes each tile's logits again and turns them
    into their gradient in place: d logp / d logits = onehot(target) - softmax(logits)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        soft_cap: float | None,
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        normalizers, chosen, correct = [], [], []
        for rows in _cuts(len(hidden), tile[0]):
            parts = [
                _summed(_logits(hidden[rows], weight, bias, soft_cap, columns), targets[rows] - columns.start)
                for columns in _cuts(len(weight), tile[1])
            ]
            normalizer, at_target, largest = (torch.stack(part) for part in zip(*parts, strict=True))
            normalizers.append(normalizer.logsumexp(0))
            chosen.append(at_target.amax(0))
            correct.append(chosen[-1] == largest.amax(0))
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        ctx.soft_cap, ctx.tile = soft_cap, tile
        is_correct = torch.cat(correct)
        ctx.mark_non_differentiable(is_correct)
        return torch.cat(chosen) - normalizer, is_correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        # Tiles add up in float32 or wider; autograd rounds the sums where an input wants its own precision.
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(tensor, dtype=normalizer.dtype) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        for rows, columns in product(_cuts(len(hidden), ctx.tile[0]), _cuts(len(weight), ctx.tile[1])):
            logits = _logits(hidden[rows], weight, bias, ctx.soft_cap, columns)
            slope = _slope(logits, targets[rows] - columns.start, normalizer[rows], grads[0][rows], ctx.soft_cap)
            del logits  # or the next tile stands beside this one
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                _add_product(grad_hidden[rows], slope, weight[columns])
            if grad_weight is not None:
                _add_product(grad_weight[columns], slope.T, hidden[rows])
            if grad_bias is not None:
                grad_bias[columns].add_(slope.sum(0, dtype=grad_bias.dtype))
            del slope
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """The product is that of a tile; the total may be wider than its factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for rows in _cuts(len(total), PRODUCT_ROWS.get(total.device.type, len(total))):
        total[rows] += _product(left[rows], right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In float32 of factors in half precision, where the device does not round it before."""
    if _keeps_float32(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _keeps_float32(factor: Tensor) -> bool:
    """cuBLAS adds up in float32 and rounds at the end, unless told otherwise; no other backend can be told."""
    return factor.device.type == "cuda" and factor.dtype in (torch.bfloat16, torch.float16)


def _cuts(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, soft_cap: float | None, columns: slice) -> Tensor:
    """A fresh tensor, float32 or wider, that the caller may overwrite."""
    own_bias = None if bias is None else bias[columns]
    if _keeps_float32(rows):
        logits = _product(rows, weight[columns].T)
        logits = logits if own_bias is None else logits.add_(own_bias)
    else:
        logits = torch.nn.functional.linear(rows, weight[columns], own_bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if soft_cap is None else logits.div_(soft_cap).tanh_().mul_(soft_cap)


def _summed(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the log-sum-exp, the logit of its target, -inf where that is in another tile, and the largest.
    Overwrites the logits."""
    place, here = _place(targets, logits)
    at_target = logits.gather(1, place)[:, 0].masked_fill(~here, -torch.inf)
    largest = logits.amax(1)
    return logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest), at_target, largest


def _slope(logits: Tensor, targets: Tensor, normalizer: Tensor, grad: Tensor, soft_cap: float | None) -> Tensor:
    """The logits turned into their gradient."""
    cap_slope = None if soft_cap is None else 1 - (logits / soft_cap) ** 2
    place, here = _place(targets, logits)
    slope = logits.sub_(normalizer[:, None]).exp_().mul_(-grad[:, None])
    slope.scatter_add_(1, place, (grad * here)[:, None])
    return slope if cap_slope is None else slope.mul_(cap_slope)


def _place(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, 1] the target's column in this tile, any if it is in another one, and [rows] whether it is in this."""
    last = logits.shape[1] - 1
    return targets.clamp(0, last)[:, None], (targets >= 0) & (targets <= last)

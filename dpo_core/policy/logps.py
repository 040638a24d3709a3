"""Computes log-probabilities of tokens from hidden states. Unless there are few logits, only a tile of them is in
memory at a time: some rows (tokens), and a part of the vocabulary."""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from dpo_core.plan.rules import TILE_COLUMNS, TILE_ROWS, keeps_logits

PRODUCT_ROWS = {"cpu": 2048}  # rows of a product computed at a time, few enough to fit into caches


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
    """Computes the logits hidden @ weight.T + bias of R rows of `hidden`. Returns two tensors: the log-probability of
    each row's target, log softmax(logits)[target], [R], and whether the target has the largest logit, [R].

    Shapes, for R rows, width H and a vocabulary of V tokens: hidden [R, H], weight [V, H], bias [V] or None, targets
    [R]. The log-probabilities are in float32 or wider; the second tensor has no gradient. With a `soft_cap`, logits
    become `soft_cap * tanh(logits / soft_cap)` before the softmax, as in Gemma. At most `tile_rows` x `tile_columns`
    logits are computed at a time; None for `tile_rows` means a number that suits the device. On a CPU all logits are
    kept for the backward pass if they are few (`keeps_logits`); otherwise only one tile of them is held at a time.
    """
    device = hidden.device.type
    tile = (tile_rows or TILE_ROWS.get(device, 1024), tile_columns)
    keep = torch.is_grad_enabled() and keeps_logits(device, len(hidden), len(weight), capped=soft_cap is not None)
    logps_and_correct: tuple[Tensor, Tensor] = _TiledLogps.apply(hidden, weight, bias, targets, soft_cap, tile, keep)  # type: ignore[no-untyped-call]
    return logps_and_correct


class _TiledLogps(torch.autograd.Function):
    """Computes log-probabilities tile by tile: some rows (tokens) times a part of the vocabulary.

    Backward overwrites each tile with the gradient: d logp / d logits = onehot(target) - softmax(logits). It takes the
    tile from those that the forward pass has kept, or computes it again, with the same result bit for bit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        soft_cap: float | None,
        tile: tuple[int, int],
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        normalizers, chosen, correct = [], [], []
        tiles: list[tuple[Tensor | None, Tensor]] = []  # exp(logits - largest) if kept, and each row's largest logit
        for rows in _cuts(len(hidden), tile[0]):
            parts = []
            for columns in _cuts(len(weight), tile[1]):
                logits = _logits(hidden[rows], weight, bias, soft_cap, columns)
                parts.append(_summed(logits, targets[rows] - columns.start))
                tiles.append((logits if keep else None, parts[-1][2]))
                del logits  # frees this tile before the next one is computed
            normalizer, at_target, largest = (torch.stack(part) for part in zip(*parts, strict=True))
            normalizers.append(normalizer.logsumexp(0))
            chosen.append(at_target.amax(0))
            correct.append(chosen[-1] == largest.amax(0))
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        ctx.soft_cap, ctx.tile, ctx.tiles = soft_cap, tile, tiles
        is_correct = torch.cat(correct)
        ctx.mark_non_differentiable(is_correct)
        return torch.cat(chosen) - normalizer, is_correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        # Tiles are summed in float32 or wider; autograd rounds the sums to the precision of each input.
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(tensor, dtype=normalizer.dtype) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        cuts = product(_cuts(len(hidden), ctx.tile[0]), _cuts(len(weight), ctx.tile[1]))
        for number, (rows, columns) in enumerate(cuts):
            (kept, largest), cap_slope = ctx.tiles[number], None
            ctx.tiles[number] = None, largest  # what is kept is overwritten here; another backward pass computes it
            if kept is None:
                kept = _logits(hidden[rows], weight, bias, ctx.soft_cap, columns)
                cap_slope = None if ctx.soft_cap is None else 1 - (kept / ctx.soft_cap) ** 2
                kept.sub_(largest[:, None]).exp_()
            slope = _slope(kept, largest, targets[rows] - columns.start, normalizer[rows], grads[0][rows])
            slope = (slope if cap_slope is None else slope.mul_(cap_slope)).to(hidden.dtype)
            del kept, cap_slope  # frees this tile before the next one is computed
            if grad_hidden is not None:
                _add_product(grad_hidden[rows], slope, weight[columns])
            if grad_weight is not None:
                _add_product(grad_weight[columns], slope.T, hidden[rows])
            if grad_bias is not None:
                grad_bias[columns].add_(slope.sum(0, dtype=grad_bias.dtype))
            del slope
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total`, in place. `total` may have a wider dtype than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for rows in _cuts(len(total), PRODUCT_ROWS.get(total.device.type, len(total))):
        total[rows] += _product(left[rows], right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right. On CUDA the product of half-precision factors is float32, because cuBLAS can return its
    sums unrounded; any other product has the factors' dtype."""
    if _keeps_float32(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _keeps_float32(factor: Tensor) -> bool:
    """Whether `_product` returns the product of half-precision factors in float32, given the left factor. Only cuBLAS,
    on CUDA, can return the sums unrounded."""
    return factor.device.type == "cuda" and factor.dtype in (torch.bfloat16, torch.float16)


def _cuts(length: int, size: int) -> list[slice]:
    """Returns slices of at most `size` elements that together cover `length` elements."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, soft_cap: float | None, columns: slice) -> Tensor:
    """Returns the logits of a tile in float32 or wider. The tile covers the rows (hidden states of tokens) in `rows`,
    and the part `columns` of the vocabulary. `weight` and `bias` are those of the head. `soft_cap` is the limit of the
    logits, None if they have none. The tensor is new, so the caller may overwrite it."""
    tile_bias = None if bias is None else bias[columns]
    if _keeps_float32(rows):
        logits = _product(rows, weight[columns].T)
        logits = logits if tile_bias is None else logits.add_(tile_bias)
    else:
        logits = torch.nn.functional.linear(rows, weight[columns], tile_bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if soft_cap is None else logits.div_(soft_cap).tanh_().mul_(soft_cap)


def _summed(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three tensors over the rows of a tile (the logits for a part of the vocabulary), [rows] each:

    - the log-sum-exp of the row's logits
    - the logit of the row's target token, or -inf if the target is in another tile
    - the row's largest logit

    Overwrites `logits` with exp(logits - largest).
    """
    place, here = _place(targets, logits)
    at_target = logits.gather(1, place)[:, 0].masked_fill(~here, -torch.inf)
    largest = logits.amax(1)
    return logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest), at_target, largest


def _slope(exponentials: Tensor, largest: Tensor, targets: Tensor, normalizer: Tensor, grad: Tensor) -> Tensor:
    """Returns the gradient of the loss with respect to a tile of logits. Overwrites `exponentials` with it.

    `_summed` has made `exponentials`, which are exp(logits - largest), and `largest`, the largest logit of each row.
    `targets` has the target token of each row of the tile, and `normalizer` the log-sum-exp of each row's logits.
    `grad` is the loss's gradient with respect to the log-probabilities of the targets.
    """
    place, here = _place(targets, exponentials)
    slope = exponentials.mul_(((largest - normalizer).exp_() * -grad)[:, None])
    return slope.scatter_add_(1, place, (grad * here)[:, None])


def _place(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the target tokens in a tile (the logits for a part of the vocabulary). Returns two tensors over the tile's
    rows: the column of the row's target in the tile, [rows, 1], and whether the target is in this tile, [rows]. For a
    target in another tile, the column is an arbitrary valid one."""
    last = logits.shape[1] - 1
    return targets.clamp(0, last)[:, None], (targets >= 0) & (targets <= last)

"""Talks to the other processes of a training run. All functions also work for a single process."""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def num_local_ranks() -> int:
    """Returns how many ranks run on this node: LOCAL_WORLD_SIZE, or all ranks if it is not set."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks()))


def all_reduce_sum(*tensors: Tensor) -> None:
    """Sums each tensor over ranks, in place. All tensors of a dtype travel in one message."""
    if num_ranks() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in an order that is the same on all ranks
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in same])
        dist.all_reduce(flat)
        for tensor, part in zip(same, flat.split_with_sizes([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def all_reduce_min(value: int, device: torch.device) -> int:
    """Returns the smallest value of all ranks."""
    smallest = torch.tensor(value, device=device)
    if num_ranks() > 1:
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest.item())


def on_any_rank(values: Sequence[bool], device: torch.device, group: dist.ProcessGroup | None = None) -> list[bool]:
    """Returns for each value whether it is true on at least one rank. All ranks get the same answer."""
    if num_ranks() == 1:
        return list(values)
    flags = torch.tensor(values, dtype=torch.uint8, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in flags.tolist()]


def together(work: Callable[[], T], device: torch.device, group: dist.ProcessGroup | None = None) -> T:
    """Returns the result of `work` on this rank. If it fails on one rank, this raises on all, so that none waits."""
    try:
        result = work()
    except Exception:
        on_any_rank([True], device, group)
        raise
    if any(on_any_rank([False], device, group)):
        raise RuntimeError("Another rank failed in work that all ranks do together; see the error of that rank.")
    return result

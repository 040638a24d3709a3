"""The processes that train together; one process is a group of its own."""

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
    """Those of this node, as its launcher says; else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks()))


def add_up(*tensors: Tensor) -> None:
    """Sums over ranks, in place; of many tensors in one message per dtype."""
    if num_ranks() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in an order that is the same on all ranks
        own = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in own])
        dist.all_reduce(flat)
        for tensor, part in zip(own, flat.split_with_sizes([tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(part.view_as(tensor))


def lowest(value: int, device: torch.device) -> int:
    """The smallest over ranks."""
    found = torch.tensor(value, device=device)
    if num_ranks() > 1:
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found.item())


def on_any_rank(values: Sequence[bool], device: torch.device, group: dist.ProcessGroup | None = None) -> list[bool]:
    """Of each value, whether it is true on at least one; all ranks learn the same."""
    if num_ranks() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.uint8, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return [bool(value) for value in found.tolist()]


def together(work: Callable[[], T], device: torch.device, group: dist.ProcessGroup | None = None) -> T:
    """What `work` returns on this rank. Where it fails on one it fails on all, before they wait for each other."""
    try:
        result = work()
    except Exception:
        on_any_rank([True], device, group)
        raise
    if any(on_any_rank([False], device, group)):
        raise RuntimeError("Another rank failed in what all do together; its own error says why.")
    return result

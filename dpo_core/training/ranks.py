"""Exchanges data with the other ranks (processes) of a training run. All functions also work in a run of one
process."""

import os
import re
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class MemoryRanOut(RuntimeError):
    """Raised on all ranks (processes of the run) if memory ran out on one of them. A smaller number of tokens in a
    forward pass may help."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def num_local_ranks() -> int:
    """Returns the number of ranks (processes of the run) on this node, from the environment variable LOCAL_WORLD_SIZE.
    If the variable is not set, all ranks are taken to be on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks()))


def all_reduce_sum(*tensors: Tensor) -> None:
    """Sums each tensor over all ranks (processes of the run), in place. All tensors of the same dtype are sent in one
    message."""
    if num_ranks() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # the same order on all ranks
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in same])
        dist.all_reduce(flat)
        for tensor, part in zip(same, flat.split_with_sizes([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def all_reduce_min(value: int, device: torch.device) -> int:
    """Returns the smallest `value` that any rank (process of the run) has passed; all ranks get the same result."""
    smallest = torch.tensor(value, device=device)
    if num_ranks() > 1:
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest.item())


def on_any_rank(values: Sequence[bool], device: torch.device, group: dist.ProcessGroup | None = None) -> list[bool]:
    """Compares a list of flags, `values`, over all ranks (processes of the run). The result is a list, too, and the
    same on all ranks: a flag of it is true if the flag at this position is true on at least one rank. `group` is the
    process group of the exchange; None means PyTorch's default group."""
    if num_ranks() == 1:
        return list(values)
    flags = torch.tensor(values, dtype=torch.uint8, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in flags.tolist()]


def within_memory(work: Callable[[], T], device: torch.device) -> T:
    """Calls `work` on every rank (process of the run) and returns the result of this rank. If memory runs out on one
    rank, every rank raises MemoryRanOut, so that no rank waits for another. `work` must not exchange data with other
    processes."""
    result, ran_out = None, False
    try:
        result = work()
    except (RuntimeError, MemoryError) as error:
        ran_out = is_out_of_memory(error)
        if not ran_out:
            raise
    # Here the error is gone, and with it the tensors that its traceback held.
    if any(on_any_rank([ran_out], device)):
        raise MemoryRanOut("Memory ran out in a forward pass (a pack); lower max_tokens_per_pack.")
    return cast(T, result)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that the memory of the GPU ran out or, for a CPU, the memory of the system."""
    on_cpu = re.search(r"can't allocate memory|not enough memory|bad_alloc", str(error))  # plain RuntimeErrors
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or on_cpu is not None


def together(work: Callable[[], T], device: torch.device, group: dist.ProcessGroup | None = None) -> T:
    """Calls `work` on every rank (process of the run) and returns the result of this rank. If `work` fails on one rank,
    every rank raises an error, so that no rank waits for another. `group` is the process group in which the ranks tell
    each other whether `work` failed; None means PyTorch's default group."""
    try:
        result = work()
    except Exception:
        on_any_rank([True], device, group)
        raise
    if any(on_any_rank([False], device, group)):
        raise RuntimeError("Another rank failed while all ranks worked together; see the error in that rank's log.")
    return result

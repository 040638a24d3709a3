"""Holds the trained parameters: their float32 masters, their gradients, and how they are split over ranks."""

from collections.abc import Mapping
from itertools import chain, compress
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_core.config import Sharding
from dpo_core.models.architecture import decoder_layers, is_sharded
from dpo_core.models.model import has_adapter
from dpo_core.options import InvalidOption
from dpo_core.plan.rules import fewest_shards
from dpo_core.policy.scorer import Scorer
from dpo_core.training.ranks import all_reduce_min, all_reduce_sum, num_local_ranks, num_ranks, on_any_rank


class Weights:
    """The trained parameters of a policy by name, and the tensors that the optimizer steps.

    The optimizer steps a float32 master of each parameter in half precision. Gradients are float32 or wider. Ranks hold
    copies and sum their gradients, unless the policy is sharded. `dtypes` are the parameters' dtypes before sharding,
    which makes shards float32; the model is saved in these dtypes.
    """

    def __init__(self, policy: PreTrainedModel, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self.dtypes = dtypes or dtypes_of(policy)
        self.trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.is_sharded = is_sharded(policy)
        halves = {name: p for name, p in self.trained.items() if _is_half(p.dtype)}
        for parameter in halves.values():
            parameter.grad_dtype = torch.float32
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in halves.items()}
        self.stepped = self.trained | self.masters

    @property
    def in_float32(self) -> dict[str, nn.Parameter]:
        """The stepped float32 weights that the saved model holds in half precision."""
        return {name: p for name, p in self.stepped.items() if _is_half(self.dtypes[name])}

    @torch.no_grad()
    def collect_gradients(self, max_norm: float) -> Tensor:
        """Sums the gradients of all ranks, scales them down to `max_norm`, and returns their norm before that.

        The stepped tensors get them. A parameter without a gradient on any rank gets none and does not change.
        """
        reached = [parameter.grad is not None for parameter in self.trained.values()]
        if not self.is_sharded:
            reached = on_any_rank(reached, next(iter(self.trained.values())).device)
        names = list(compress(self.trained, reached))
        for name in names:
            parameter = self.trained[name]
            gradient = torch.zeros_like(self.stepped[name]) if parameter.grad is None else parameter.grad
            parameter.grad = None
            self.stepped[name].grad = gradient
        if not self.is_sharded:
            all_reduce_sum(*(cast(Tensor, self.stepped[name].grad) for name in names))
        norm = nn.utils.clip_grad_norm_(self.stepped.values(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def update_policy(self) -> None:
        """Copies the masters into the policy, and drops all gradients."""
        for parameter in self.stepped.values():
            parameter.grad = None
        if self.masters:
            names = list(self.masters)
            torch._foreach_copy_([self.trained[name] for name in names], [self.masters[name] for name in names])

    def release(self) -> None:
        """Removes what training added to the policy's parameters, so that the caller may train it in another way."""
        for parameter in (*self.trained.values(), *self.masters.values()):
            parameter.grad = None
        for name in self.masters:
            self.trained[name].grad_dtype = self.trained[name].dtype


def dtypes_of(policy: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in policy.named_parameters()}


def _is_half(dtype: torch.dtype) -> bool:
    return dtype.itemsize < torch.float32.itemsize


def agree_on_weights(policy: nn.Module) -> None:
    """Gives all ranks the weights of rank 0."""
    if num_ranks() > 1:
        for tensor in chain(policy.parameters(), policy.buffers()):
            dist.broadcast(tensor.data, 0)


def shard(scorer: Scorer, sharding: Sharding) -> None:
    """Splits weights, gradients and optimizer state over ranks with FSDP2, which gathers each layer to compute it.

    A policy in half precision computes in it, while shards of trained weights are float32.
    """
    policy, shards = scorer.model, num_shards(scorer, sharding)
    if shards == 1:
        return
    if not scorer.takes_batches:
        message = f"sharding is {sharding}, which {type(policy).__name__} does not support; it must be replicated."
        raise InvalidOption("sharding", message)
    mesh, dtype = _mesh(policy, shards), policy.dtype
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*decoder_layers(policy), scorer):
        for parameter in module.parameters():  # layer by layer, so that only one is whole in float32
            if parameter.requires_grad and _is_half(parameter.dtype):
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, mp_policy=precision)
    for module in scorer.modules():
        if isinstance(module, FSDPModule):  # losses are already divided by the global batch's counts
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def num_shards(scorer: Scorer, sharding: Sharding) -> int:
    """Returns into how many parts `shard` splits each weight, the same on all ranks."""
    policy, ranks, local_ranks = scorer.model, num_ranks(), num_local_ranks()
    if sharding != "auto":
        return {"replicated": 1, "hybrid": local_ranks, "full": ranks}[sharding]
    if policy.device.type != "cuda" or not scorer.takes_batches:
        return 1
    room = all_reduce_min(torch.cuda.mem_get_info(policy.device)[1], policy.device)
    least = 1 if has_adapter(policy) else local_ranks
    return fewest_shards((least, local_ranks, ranks), lambda shards: state_bytes(policy, shards), room)


def state_bytes(policy: PreTrainedModel, shards: int) -> int:
    """Returns the bytes of weights, gradients and AdamW's moments on a rank.

    With shards, a rank also holds whole weights while it computes, and gradients of those that are trained: all that
    are outside the layers, and two layers, because the next one is fetched ahead.
    """
    num_bytes: int = 0
    for parameter in policy.parameters():
        stepped = max(parameter.itemsize, torch.float32.itemsize)  # bytes of a number that AdamW steps, and of a moment
        weight = parameter.itemsize
        if parameter.requires_grad and shards > 1:
            weight = stepped
        elif parameter.requires_grad and _is_half(parameter.dtype):
            weight += stepped  # its master
        num_bytes += parameter.numel() * (weight + 3 * stepped * parameter.requires_grad)
    if shards == 1:
        return num_bytes
    layers = [_with_gradients(layer) for layer in decoder_layers(policy)]
    outside = _with_gradients(policy) - sum(layers)
    gathered: int = policy.dtype.itemsize * (outside + 2 * max(layers, default=0))
    return num_bytes // shards + gathered


def _with_gradients(module: nn.Module) -> int:
    """Returns how many numbers a module's weights and their gradients have."""
    numbers: int = sum(weight.numel() * (1 + weight.requires_grad) for weight in module.parameters())
    return numbers


def _mesh(policy: PreTrainedModel, shards: int) -> DeviceMesh:
    if shards == num_ranks():
        return init_device_mesh(policy.device.type, (shards,))
    sizes = (num_ranks() // shards, shards)
    return init_device_mesh(policy.device.type, sizes, mesh_dim_names=("copies", "shards"))

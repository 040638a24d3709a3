"""The trained parameters: how ranks hold them, and what the optimizer steps on."""

from itertools import chain
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_core.config import Sharding
from dpo_core.model import decoder_layers, has_adapter, is_sharded
from dpo_core.options import InvalidOption
from dpo_core.ranks import add_up, num_local_ranks, num_ranks
from dpo_core.scorer import Scorer


class Weights:
    """What is trained of a policy, by name.

    Parameters in half precision have float32 masters that the optimizer steps on. Gradients are float32.
    Ranks hold copies, and add their gradients up, unless the policy is sharded.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        self.trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.is_sharded = is_sharded(policy)
        for parameter in self.trained.values():
            if parameter.dtype != torch.float32:
                parameter.grad_dtype = torch.float32
        self.masters = {
            name: nn.Parameter(p.detach().float()) for name, p in self.trained.items() if p.dtype != torch.float32
        }
        self.stepped = self.trained | self.masters

    @torch.no_grad()
    def collect_gradients(self, max_norm: float) -> Tensor:
        """Hand the gradients of all ranks to what is stepped, scaled down to `max_norm`; returns their norm before."""
        for name, parameter in self.trained.items():
            gradient = torch.zeros_like(self.stepped[name]) if parameter.grad is None else parameter.grad
            parameter.grad = None
            self.stepped[name].grad = gradient
        if not self.is_sharded:
            add_up(*(cast(Tensor, parameter.grad) for parameter in self.stepped.values()))
        norm = nn.utils.clip_grad_norm_(self.stepped.values(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the stepped weights to the policy, and drop the gradients."""
        for parameter in self.stepped.values():
            parameter.grad = None
        if self.masters:
            names = list(self.masters)
            torch._foreach_copy_([self.trained[name] for name in names], [self.masters[name] for name in names])


def agree_on_weights(policy: nn.Module) -> None:
    """All ranks start from rank 0's weights."""
    if num_ranks() > 1:
        for tensor in chain(policy.parameters(), policy.buffers()):
            dist.broadcast(tensor.data, 0)


def shard(scorer: Scorer, sharding: Sharding) -> None:
    """FSDP2: split weights, gradients and optimizer state over ranks, and gather each layer when it computes.

    A policy in half precision computes in it; its shards are float32. `hybrid` splits within a node and
    copies between nodes (HSDP). `auto` splits full weights on GPUs, and copies adapters and whatever is on CPUs.
    """
    policy = scorer.model
    if num_shards(policy, sharding) == 1:
        return
    if not scorer.takes_batches:
        message = f"sharding is {sharding}, which {type(policy).__name__} cannot do; it must be replicated."
        raise InvalidOption("sharding", message)
    mesh, dtype = _mesh(policy, sharding), policy.dtype
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*decoder_layers(policy), scorer):
        fully_shard(module.float(), mesh=mesh, mp_policy=precision)
    for module in scorer.modules():
        if isinstance(module, FSDPModule):  # losses are divided by the global batch's counts already
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def num_shards(policy: PreTrainedModel, sharding: Sharding) -> int:
    """Into how many parts `shard` splits each weight."""
    on_gpus = policy.device.type == "cuda" and not has_adapter(policy)
    if sharding == "replicated" or (sharding == "auto" and not on_gpus):
        return 1
    return num_ranks() if sharding == "full" else num_local_ranks()


def _mesh(policy: PreTrainedModel, sharding: Sharding) -> DeviceMesh:
    shards = num_shards(policy, sharding)
    if shards == num_ranks():
        return init_device_mesh(policy.device.type, (shards,))
    sizes = (num_ranks() // shards, shards)
    return init_device_mesh(policy.device.type, sizes, mesh_dim_names=("copies", "shards"))

"""The trained parameters: how ranks hold them, and what the optimizer steps on."""

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
from dpo_core.training.ranks import add_up, lowest, num_local_ranks, num_ranks, on_any_rank


class Weights:
    """The parameters of a policy that are trained, by name, and what the optimizer steps on for each.

    Parameters in half precision have float32 masters that the optimizer steps on. Gradients are float32 or wider.
    Ranks hold copies, and add their gradients up, unless the policy is sharded. `dtypes` are those that its
    parameters had before: shards are float32. A model is saved in them.
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
        """The stepped weights of which the saved model has fewer bits."""
        return {name: p for name, p in self.stepped.items() if _is_half(self.dtypes[name])}

    @torch.no_grad()
    def collect_gradients(self, max_norm: float) -> Tensor:
        """Hand the gradients of all ranks to what is stepped, scaled down to `max_norm`; returns their norm before.

        A parameter that has a gradient on no rank gets none, and stays as it is.
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
            add_up(*(cast(Tensor, self.stepped[name].grad) for name in names))
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

    def release(self) -> None:
        """Leave the policy to its owner, who may train it in another way."""
        for parameter in (*self.trained.values(), *self.masters.values()):
            parameter.grad = None
        for name in self.masters:
            self.trained[name].grad_dtype = self.trained[name].dtype


def dtypes_of(policy: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in policy.named_parameters()}


def _is_half(dtype: torch.dtype) -> bool:
    return dtype.itemsize < torch.float32.itemsize


def agree_on_weights(policy: nn.Module) -> None:
    """All ranks start from rank 0's weights."""
    if num_ranks() > 1:
        for tensor in chain(policy.parameters(), policy.buffers()):
            dist.broadcast(tensor.data, 0)


def shard(scorer: Scorer, sharding: Sharding) -> None:
    """FSDP2: split weights, gradients and optimizer state over ranks, and gather each layer when it computes.

    A policy in half precision computes in it; the shards of what is trained are float32.
    """
    policy, shards = scorer.model, num_shards(scorer, sharding)
    if shards == 1:
        return
    if not scorer.takes_batches:
        message = f"sharding is {sharding}, which {type(policy).__name__} cannot do; it must be replicated."
        raise InvalidOption("sharding", message)
    mesh, dtype = _mesh(policy, shards), policy.dtype
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*decoder_layers(policy), scorer):
        for parameter in module.parameters():  # one layer after the other, so that one alone is whole in float32
            if parameter.requires_grad and _is_half(parameter.dtype):
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, mp_policy=precision)
    for module in scorer.modules():
        if isinstance(module, FSDPModule):  # losses are divided by the global batch's counts already
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def num_shards(scorer: Scorer, sharding: Sharding) -> int:
    """Into how many parts `shard` splits each weight; all ranks decide alike."""
    policy, ranks, local_ranks = scorer.model, num_ranks(), num_local_ranks()
    if sharding != "auto":
        return {"replicated": 1, "hybrid": local_ranks, "full": ranks}[sharding]
    if policy.device.type != "cuda" or not scorer.takes_batches:
        return 1
    room = lowest(torch.cuda.mem_get_info(policy.device)[1], policy.device)
    least = 1 if has_adapter(policy) else local_ranks
    return fewest_shards((least, local_ranks, ranks), lambda shards: state_bytes(policy, shards), room)


def state_bytes(policy: PreTrainedModel, shards: int) -> int:
    """What weights, gradients and AdamW's moments take of a rank. Of shards, what computes is whole, with the gradients
    of what is trained there: all that is outside the layers and, as the next one is fetched ahead, two layers."""
    kept: int = 0
    for parameter in policy.parameters():
        stepped = max(parameter.itemsize, torch.float32.itemsize)  # bytes of a number that AdamW steps, and of a moment
        weight = parameter.itemsize
        if parameter.requires_grad and shards > 1:
            weight = stepped
        elif parameter.requires_grad and _is_half(parameter.dtype):
            weight += stepped  # its master
        kept += parameter.numel() * (weight + 3 * stepped * parameter.requires_grad)
    if shards == 1:
        return kept
    layers = [_with_gradients(layer) for layer in decoder_layers(policy)]
    outside = _with_gradients(policy) - sum(layers)
    gathered: int = policy.dtype.itemsize * (outside + 2 * max(layers, default=0))
    return kept // shards + gathered


def _with_gradients(module: nn.Module) -> int:
    """How many numbers its weights and their gradients have."""
    numbers: int = sum(weight.numel() * (1 + weight.requires_grad) for weight in module.parameters())
    return numbers


def _mesh(policy: PreTrainedModel, shards: int) -> DeviceMesh:
    if shards == num_ranks():
        return init_device_mesh(policy.device.type, (shards,))
    sizes = (num_ranks() // shards, shards)
    return init_device_mesh(policy.device.type, sizes, mesh_dim_names=("copies", "shards"))

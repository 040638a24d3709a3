"""Holds the trained parameters of a policy, with their gradients, their float32 copies if they are in half precision,
and their division over ranks (processes)."""

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
from dpo_core.models.architecture import decoder_layers, device_of, is_sharded
from dpo_core.models.model import has_adapter
from dpo_core.models.quantization import is_quantized, scales_of
from dpo_core.options import InvalidOption
from dpo_core.plan.rules import fewest_shards
from dpo_core.policy.scorer import Scorer
from dpo_core.training.ranks import all_reduce_min, all_reduce_sum, num_local_ranks, num_ranks, on_any_rank


class Weights:
    """The trained parameters of a policy by name (`trained`), and the tensors that the optimizer updates (`stepped`).

    For a parameter in half precision the optimizer updates a float32 copy, the parameter's master. Gradients are
    float32 or wider. If the policy is not sharded, each rank (process of the run) has all parameters and sums its
    gradients with those of the other ranks. `dtypes` are the dtypes of the parameters before sharding, because shards
    are always float32. Checkpoints save the model in these dtypes.
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
        """The parameters that the saved model holds in half precision, by name. The value for each name is the float32
        tensor that the optimizer updates in place of the parameter."""
        return {name: p for name, p in self.stepped.items() if _is_half(self.dtypes[name])}

    @torch.no_grad()
    def collect_gradients(self, max_norm: float) -> Tensor:
        """Sums the gradients of all ranks (processes of the run), scales them down so that their norm is at most
        `max_norm`, and returns the norm before scaling.

        The gradients are moved to the tensors that the optimizer updates. If no rank has a gradient for a parameter,
        the parameter does not change.
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
        """Copies the float32 masters, which the optimizer has updated, into the policy's weights. Masters are copies of
        weights that are in half precision. Drops all gradients."""
        self.drop_gradients()
        if self.masters:
            names = list(self.masters)
            torch._foreach_copy_([self.trained[name] for name in names], [self.masters[name] for name in names])

    def drop_gradients(self) -> None:
        for parameter in (*self.trained.values(), *self.masters.values()):
            parameter.grad = None

    def release(self) -> None:
        """Removes what training has added to the policy's parameters: their gradients, and the dtype that was set for
        gradients. Afterwards the policy can be trained again, with other options."""
        self.drop_gradients()
        for name in self.masters:
            self.trained[name].grad_dtype = self.trained[name].dtype


def dtypes_of(policy: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in policy.named_parameters()}


def _is_half(dtype: torch.dtype) -> bool:
    return dtype.itemsize < torch.float32.itemsize


def agree_on_weights(policy: nn.Module) -> None:
    """Copies the policy's weights from rank 0 to all other ranks (processes of the run), so that all begin with the
    same weights. Leaves out weights that are sharded or not read yet."""
    if num_ranks() > 1:
        for tensor in chain(policy.parameters(), policy.buffers(), scales_of(policy)):
            if not (isinstance(tensor, DTensor) or tensor.is_meta):
                dist.broadcast(tensor.data, 0)


def shard(scorer: Scorer, sharding: Sharding) -> None:
    """Splits the policy's weights, gradients and optimizer state over ranks (processes of the run), as the option
    `sharding` says. FSDP2 does this; it gathers each layer from all ranks when the layer is computed.

    A policy in half precision computes in half precision, while the shards of its trained weights are float32. Raises
    InvalidOption for a policy that cannot be split.
    """
    policy, shards = scorer.model, num_shards(scorer, sharding)
    if shards == 1:
        return
    if not scorer.takes_batches:
        what = f"The option 'sharding' is '{sharding}', which {type(policy).__name__} does not support"
        raise InvalidOption("sharding", f"{what}; set 'sharding' to 'replicated'.")
    if is_quantized(policy):
        what = f"The option 'sharding' is '{sharding}', but a base model in nf4 cannot be split over workers"
        raise InvalidOption("sharding", f"{what}; set 'sharding' to 'replicated'.")
    mesh, dtype = _mesh(policy, shards), policy.dtype
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*decoder_layers(policy), scorer):
        for parameter in module.parameters():  # one layer at a time, so that only one layer is whole in float32
            if parameter.requires_grad and _is_half(parameter.dtype):
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, mp_policy=precision)
    for module in scorer.modules():
        if isinstance(module, FSDPModule):  # losses are already divided by counts of all ranks
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def num_shards(scorer: Scorer, sharding: Sharding) -> int:
    """Returns the number of shards into which the option `sharding` splits each weight of the policy. All ranks
    (processes of the run) get the same number."""
    policy, ranks, local_ranks = scorer.model, num_ranks(), num_local_ranks()
    if sharding != "auto":
        return {"replicated": 1, "hybrid": local_ranks, "full": ranks}[sharding]
    if device_of(policy).type != "cuda" or not scorer.takes_batches or is_quantized(policy):
        return 1
    room = all_reduce_min(torch.cuda.mem_get_info(device_of(policy))[1], device_of(policy))
    least = 1 if has_adapter(policy) else local_ranks
    return fewest_shards((least, local_ranks, ranks), lambda shards: state_bytes(policy, shards), room)


def state_bytes(policy: PreTrainedModel, shards: int, dtype: torch.dtype | None = None) -> int:
    """Returns the bytes that the policy's weights, their gradients and AdamW's moments take on one rank (process of the
    run). Each weight is split into `shards` parts. `dtype` is the dtype in which the policy computes; None means the
    dtype of its weights.

    With several shards, a rank also holds some whole weights while it computes: those outside the layers, and those of
    two layers, because the next layer is fetched ahead. For the trained ones among them, the rank also holds whole
    gradients.
    """
    num_bytes: int = 0
    for parameter in policy.parameters():
        stepped = max(parameter.itemsize, torch.float32.itemsize)  # bytes of a stepped number, and of a moment
        weight = parameter.itemsize
        if parameter.requires_grad and shards > 1:
            weight = stepped
        elif parameter.requires_grad and _is_half(parameter.dtype):
            weight += stepped  # the parameter's float32 master
        num_bytes += parameter.numel() * (weight + 3 * stepped * parameter.requires_grad)
    if shards == 1:
        return num_bytes
    layers = [_with_gradients(layer) for layer in decoder_layers(policy)]
    outside = _with_gradients(policy) - sum(layers)
    gathered: int = (dtype or policy.dtype).itemsize * (outside + 2 * max(layers, default=0))
    return num_bytes // shards + gathered


def _with_gradients(module: nn.Module) -> int:
    """Returns how many numbers the module's parameters and their gradients have together. Only trained parameters have
    gradients."""
    numbers: int = sum(weight.numel() * (1 + weight.requires_grad) for weight in module.parameters())
    return numbers


def _mesh(policy: PreTrainedModel, shards: int) -> DeviceMesh:
    if shards == num_ranks():
        return init_device_mesh(device_of(policy).type, (shards,))
    sizes = (num_ranks() // shards, shards)
    return init_device_mesh(device_of(policy).type, sizes, mesh_dim_names=("copies", "shards"))

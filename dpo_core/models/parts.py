"""Loads a model in two stages. First the model is built without weights; later each rank (process of the run) reads
only the parts of the weights that it keeps."""

import json
import logging
import re
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from dpo_core.config import Lora
from dpo_core.models.adapter import attach, linears_in, options_of, put_weights
from dpo_core.models.architecture import UNREAD, is_reward_model, kind_of, local_part
from dpo_core.models.loading import Found, read
from dpo_core.models.miniature import miniature

logger = logging.getLogger(__name__)

HEAD = "score."  # a reward model's head
# What PEFT adds to the names of weights: of a layer with an adapter, and of a head that is trained whole.
_OF_PEFT = re.compile(r"\.(base_layer|original_module|modules_to_save\.default)(?=\.)")
_ALONE = DistributedConfig(tp_size=1, fsdp_size=1, pp_size=1, ep_size=1)


class NeedsWeights(Exception):
    """Raised for a model that cannot be loaded in two stages, because its structure cannot be built without its
    weights. The error's text is the reason."""


@dataclass(frozen=True)
class Unread:
    """Says how to read the weights of a model that has none yet: from which checked folder or hub id (`found`), onto
    which device, and with which trained adapter (`adapter`, None without one). The object is an attribute of this
    model."""

    found: Found
    device: torch.device
    adapter: Path | None  # the folder of a trained adapter that is on the model


def load_structure(found: Found, device: str | torch.device, adapter: Lora | Path | None) -> PreTrainedModel:
    """Returns the model that `found` describes, without weights: its parameters are on the meta device until
    `read_parts` reads them. The parameters of a new adapter and of a reward model's new head already have values: they
    are drawn at random on the CPU, as for a model that is loaded whole.

    `adapter` is either the options of a new adapter or the folder of a trained one. Raises NeedsWeights for a model
    whose structure depends on its weights, or whose weights transformers changes while it loads them.
    """
    if found.quantization:
        raise NeedsWeights("its weights are expanded from MXFP4")
    config = deepcopy(found.config)
    config.name_or_path = str(found.source)
    with torch.device("meta"):
        model: PreTrainedModel = found.kind.from_config(config, dtype=found.dtype).eval()
    setattr(model, UNREAD, Unread(found, torch.device(device), adapter if isinstance(adapter, Path) else None))
    saved = _names_in(found.source)
    _check(model, saved)
    has_head = not is_reward_model(model) or any(name.startswith(HEAD) for name in saved)
    if not has_head:
        head = cast(Any, model).score.to_empty(device="cpu")
        model._init_weights(head)
    if adapter is not None:
        _attach(model, adapter, has_head=has_head)
    _move_drawn(model, device)
    return model


def _move_drawn(model: PreTrainedModel, device: str | torch.device) -> None:
    """Moves to the device those parameters that were drawn at random on the CPU and therefore have values already.
    Ranks (processes of the run) exchange weights on the device, and NCCL takes no CPU tensors."""
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def is_unread(model: nn.Module) -> bool:
    """Whether the model has no weights yet, because `load_structure` made it and `read_parts` has not read them."""
    return hasattr(model, UNREAD)


@torch.no_grad()
def read_parts(model: PreTrainedModel, checkpoint: Path | None = None) -> Path | None:
    """Reads the weights into a model that `load_structure` made. Of a sharded parameter, each rank (process of the run)
    reads only its own shard. All ranks must call this function together.

    Returns the folder of the trained adapter that is on the model; None if there is none. The caller must check this
    adapter with `check_base` once all ranks have their weights, because the check gathers the weights.

    The weights come from `checkpoint`, the folder of a saved model. If `checkpoint` is None, they come from the folder
    or hub id for which the model was built. Raises UnusableModel if the weights do not match the model.
    """
    unread: Unread = getattr(model, UNREAD)
    found = unread.found if checkpoint is None else replace(unread.found, source=checkpoint)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {name: own for name, own in parameters.items() if checkpoint or local_part(own).is_meta}
    with torch.random.fork_rng([]):  # transformers draws a reward model's new head, which the model has already
        loaded = _read_like(found, type(model), wanted)
    placed: dict[int, nn.Parameter] = {}
    for name, own in wanted.items():
        if id(own) not in placed:  # tied parameters are one
            taken = _as(own, loaded.get_parameter(_plain(name)).detach(), unread.device)
            placed[id(own)] = nn.Parameter(taken, requires_grad=own.requires_grad)
        _set(model, name, placed[id(own)])
        if not name.startswith(HEAD):  # with an adapter there are two of it
            _set(loaded, _plain(name), None)  # frees it
    for name, buffer in dict(model.named_buffers(remove_duplicate=False)).items():
        if buffer.is_meta:
            _set(model, name, loaded.get_buffer(_plain(name)).to(unread.device))
    for name in ("generation_config", "_weight_conversions"):
        if hasattr(loaded, name):
            setattr(model, name, getattr(loaded, name))
    delattr(model, UNREAD)
    if not any(isinstance(own, DTensor) for own in parameters.values()):
        model.to(unread.device)
    return unread.adapter


def _read_like(found: Found, kind: type[PreTrainedModel], wanted: dict[str, nn.Parameter]) -> PreTrainedModel:
    """Loads a model of class `kind` from `found`, and returns it. `wanted` are the parameters to read, by name. If a
    parameter is sharded, this rank (process of the run) reads only its own shard."""

    def split(cls: Any, model: PreTrainedModel, *others: Any) -> PreTrainedModel:
        like: dict[int, nn.Parameter] = {}
        for name, own in wanted.items():
            plain = model.get_parameter(_plain(name))
            if isinstance(own, DTensor) and not name.startswith(HEAD):  # transformers draws a new head, which is small
                shard = _like(own, plain.dtype)
                _set(model, _plain(name), like.setdefault(id(plain), nn.Parameter(shard, requires_grad=False)))
        return model

    # transformers calls `maybe_distribute_model` after it has made the model without weights, and before it reads them.
    # It then reads only the shards of parameters that are DTensors.
    members = {"maybe_distribute_model": classmethod(split), "__module__": kind.__module__}
    hooked = type(kind.__name__, (kind,), members)
    config = deepcopy(found.config)
    return read(replace(found, kind=hooked, config=config, more={"distributed_config": _ALONE}))


def _check(model: PreTrainedModel, saved: set[str]) -> None:
    """Raises NeedsWeights if `read_parts` could not give the model all its weights later. `saved` are the names of the
    weights in the model's folder."""
    if model._get_dtype_plan(model.dtype):
        raise NeedsWeights(f"some of its weights stay in float32, while the others are in {model.dtype}")
    tied = model.all_tied_weights_keys
    heads = {name.rpartition(".")[0].rpartition(".")[2] for name in tied}
    if any(name.rpartition(".")[0].rpartition(".")[2] in heads for name in saved):
        raise NeedsWeights("its folder holds weights that its config ties to others")
    for name, module in model.named_modules():
        for own, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise NeedsWeights(f"{name} computes its tensor {own} when the model is built")


def _attach(model: PreTrainedModel, adapter: Lora | Path, *, has_head: bool) -> None:
    """Puts an adapter on a model that has no weights yet. The adapter's own weights are on the CPU. `has_head` says
    whether a reward model's head will be read from its folder."""
    options = adapter if isinstance(adapter, Lora) else options_of(adapter)
    if options.use_dora:
        raise NeedsWeights("DoRA computes its first magnitudes from the weights")
    small = _miniature(model)
    rewards = is_reward_model(model)
    task_type, trained_whole = ("SEQ_CLS", ["score"]) if rewards else ("CAUSAL_LM", None)
    hollow = _hollow(model)
    attach(model, options, task_type=task_type, trained_whole=trained_whole, like=small)
    if isinstance(adapter, Path):
        put_weights(model, adapter)
    empty: dict[int, nn.Parameter] = {}
    for name, own in dict(model.named_parameters(remove_duplicate=False)).items():
        copied = has_head and isinstance(adapter, Lora) and name.startswith(HEAD)
        if id(own) in hollow or copied:
            shape = torch.empty(own.shape, dtype=own.dtype, device="meta")
            _set(model, name, empty.setdefault(id(own), nn.Parameter(shape, requires_grad=own.requires_grad)))


def _miniature(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a small model with random weights and the same kinds of layers as `model`. Raises NeedsWeights if no such
    model can be made."""
    try:
        small = miniature(model, narrow=False)
    except Exception as error:  # architectures refuse such configs with errors of any kind
        raise NeedsWeights(
            f"no small copy of it can be built to test adapters on ({type(error).__name__}: {error})"
        ) from error
    kinds = [{kind_of(name) for name in linears_in(each).values()} for each in (model, small)]
    if missing := sorted(kinds[0] - kinds[1]):
        raise NeedsWeights(f"a small copy of it has no layer {missing[0]}")
    return small


def _hollow(model: PreTrainedModel) -> dict[int, nn.Parameter]:
    """Replaces all parameters on the meta device by zeros on the CPU that take no memory, because PEFT puts an adapter
    on the device of its base. Returns a dictionary from the id of each new parameter to the parameter."""
    hollow: dict[int, nn.Parameter] = {}
    for name, own in dict(model.named_parameters(remove_duplicate=False)).items():
        if own.is_meta:
            zeros = torch.zeros((), dtype=own.dtype).expand(own.shape)
            hollow.setdefault(id(own), nn.Parameter(zeros, requires_grad=own.requires_grad))
            _set(model, name, hollow[id(own)])
    return {id(parameter): parameter for parameter in hollow.values()}


def _like(own: DTensor, dtype: torch.dtype) -> DTensor:
    """Returns an empty DTensor on the meta device, with the dtype `dtype`, that is sharded like `own`.

    There is one exception, for a weight that holds several experts. If this rank (process of the run) has no part of
    this weight, the result gives the rank a part along the last dimension. The rank drops this part later. The reason
    is that transformers cannot read such a weight on a rank without a part.
    """
    empty = cast(DTensor, torch.empty_like(own, dtype=dtype, device="meta", requires_grad=False))
    if own.ndim < 3 or own.to_local().numel():
        return empty
    placements = [Shard(own.ndim - 1) if isinstance(placement, Shard) else placement for placement in own.placements]
    local, _ = compute_local_shape_and_global_offset(own.shape, own.device_mesh, placements)
    part = torch.empty(local, dtype=dtype, device="meta")
    return DTensor.from_local(part, own.device_mesh, placements, run_check=False, shape=own.shape, stride=own.stride())


def _as(own: Tensor, taken: Tensor, device: torch.device) -> Tensor:
    """Returns a copy of the weight `taken` on the device, with the dtype and the sharding of the parameter `own`. The
    copy has memory of its own, because `taken` may be a part of a file that is mapped into memory."""
    if not isinstance(own, DTensor):
        return taken.to(device=device, dtype=own.dtype, copy=True)
    mesh, placements = own.device_mesh, own.placements
    if not isinstance(taken, DTensor):
        return distribute_tensor(taken.to(device, own.dtype), mesh, placements, src_data_rank=None)
    part = taken if own.to_local().numel() else own
    local = torch.empty_like(part.to_local(), device=device, dtype=own.dtype)
    if local.numel():
        local.copy_(part.to_local())
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=own.shape, stride=own.stride())


def _set(model: nn.Module, name: str, value: Tensor | None) -> None:
    path, _, own = name.rpartition(".")
    setattr(model.get_submodule(path), own, value)


def _plain(name: str) -> str:
    """Returns the name of a weight without the parts that PEFT adds to the name if the model has an adapter."""
    return _OF_PEFT.sub("", name)


def _names_in(source: str | Path) -> set[str]:
    """Returns the names of all weights in the safetensors files of a folder or hub id."""

    def path(name: str) -> str | None:
        found: str | None = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
        return found

    if index := path(SAFE_WEIGHTS_INDEX_NAME):
        return set(json.loads(Path(index).read_text())["weight_map"])
    if whole := path(SAFE_WEIGHTS_NAME):
        with safe_open(whole, "pt") as file:
            return set(file.keys())
    raise NeedsWeights("it has no safetensors")

"""Answers questions about a model's structure: its repeated layers, its kind of head, its device, and whether its
weights are sharded (split over processes)."""

import re

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


class UnusableModel(ValueError):
    """Raised for a model that cannot be trained in its present form. Another try would fail in the same way."""


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the layers that repeat in the model, such as its transformer blocks; an empty list if transformers does
    not say which layers repeat."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]


def kind_of(name: str) -> str:
    """Returns the name of a module or weight with `*` in place of every number of a layer or expert. The same part of
    any two layers then has the same name."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def count_outputs(model: nn.Module) -> int:
    """Returns the number of outputs of a reward model's head; 0 for a model that is not a reward model."""
    head = getattr(model, "score", None)
    head = getattr(head, "original_module", head)  # with an adapter, PEFT wraps the head and trains a copy
    return head.out_features if isinstance(head, nn.Linear) else 0


def is_reward_model(model: nn.Module) -> bool:
    return count_outputs(model) > 0


def local_part(tensor: Tensor) -> Tensor:
    """Returns the shard of the tensor that this rank (process of the run) holds; the tensor itself if the tensor is not
    sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


UNREAD = "unread_weights"  # attribute of a model whose weights are read later


def device_of(model: PreTrainedModel) -> torch.device:
    """Returns the device on which the model computes, even if its weights have not been read yet."""
    unread = getattr(model, UNREAD, None)
    device: torch.device = model.device if unread is None else unread.device
    return device


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether the model's weights are sharded over ranks (the processes of the run). If they are, all ranks must take
    part in every forward pass."""
    # During a forward only the root's weights are whole: FSDP gathers the layers one by one.
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())

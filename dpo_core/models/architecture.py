"""Answers questions about a model's structure: its layers, its head, and whether it is sharded."""

import re

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


class UnusableModel(ValueError):
    """Raised for a model that cannot be trained as it is. Trying again does not help."""


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the blocks that the architecture repeats; none if transformers does not name them."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def kind_of(name: str) -> str:
    """Returns a name without the numbers of layers and experts, so that equal parts have equal names."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def count_outputs(model: nn.Module) -> int:
    """Returns the number of outputs of a reward model's head; 0 for another model."""
    head = getattr(model, "score", None)
    head = getattr(head, "original_module", head)  # with an adapter, PEFT wraps the head and trains a copy
    return head.out_features if isinstance(head, nn.Linear) else 0


def is_reward_model(model: nn.Module) -> bool:
    return count_outputs(model) > 0


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether its weights are split over ranks, so that every forward is the work of all of them."""
    # During a forward the root's weights are whole, but the layers are gathered one by one.
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())

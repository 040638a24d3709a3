"""What a model is made of."""

import re

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


class UnusableModel(ValueError):
    """A model that cannot be trained as it is, however often it is tried."""


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that the architecture repeats, as far as transformers names them."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def kind_of(name: str) -> str:
    """A name without the numbers of layers and experts: the same for all that are built alike."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def count_outputs(model: nn.Module) -> int:
    """How many numbers a reward model's head gives; 0 for another model."""
    head = getattr(model, "score", None)
    head = getattr(head, "original_module", head)  # of which an adapter trains a copy
    return head.out_features if isinstance(head, nn.Linear) else 0


def is_reward_model(model: nn.Module) -> bool:
    return count_outputs(model) > 0


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether its weights are split over ranks, so that every forward is the work of all of them."""
    # Within a forward those of the root are whole, but the layers are gathered one by one.
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())

"""Trains language models on preferences in plain PyTorch, without code for clusters or the web.

    from dpo_core import TrainConfig, encode_group, load_policy, load_tokenizer, read_groups, score_reference, train

The package imports each of these names at the first use of the name, so importing `dpo_core` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_core.config import EarlyStop, Lora, Optim, TrainConfig
    from dpo_core.data.feedback import read_groups
    from dpo_core.data.groups import Group
    from dpo_core.encoding.encode import EncodedGroup, encode_group
    from dpo_core.models.model import load_policy, load_reward_model, load_tokenizer, merge_adapter
    from dpo_core.policy.scorer import score_reference
    from dpo_core.training.checkpoint import latest_checkpoint
    from dpo_core.training.trainer import StepResult, train

__all__ = [
    "EarlyStop",
    "EncodedGroup",
    "Group",
    "Lora",
    "Optim",
    "StepResult",
    "TrainConfig",
    "encode_group",
    "latest_checkpoint",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "merge_adapter",
    "read_groups",
    "score_reference",
    "train",
]

_FILES = {
    "training.checkpoint": ("latest_checkpoint",),
    "config": ("EarlyStop", "Lora", "Optim", "TrainConfig"),
    "encoding.encode": ("EncodedGroup", "encode_group"),
    "data.feedback": ("read_groups",),
    "data.groups": ("Group",),
    "models.model": ("load_policy", "load_reward_model", "load_tokenizer", "merge_adapter"),
    "policy.scorer": ("score_reference",),
    "training.trainer": ("StepResult", "train"),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _FILE_OF:
        raise AttributeError(f"module 'dpo_core' has no attribute {name!r}")
    return getattr(import_module(f"dpo_core.{_FILE_OF[name]}"), name)

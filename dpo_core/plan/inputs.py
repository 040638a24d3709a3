"""Defines the inputs of a plan: a model, its training rows, and the options that affect memory."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from dpo_core.config import Sharding

FLOAT32 = 4  # bytes of a gradient, of a master, and of one of AdamW's two moments


@dataclass(frozen=True)
class Shapes:
    """A model: its config.json, and the shapes of its weights by their names in safetensors."""

    config: Mapping[str, Any]
    weights: Mapping[str, Sequence[int]]

    @property
    def text(self) -> dict[str, Any]:
        """The config of the model's part that reads texts."""
        return {**self.config, **(self.config.get("text_config") or {})}

    def number(self, *names: str) -> int:
        """Returns the value of the first of these names that the config has."""
        value = next((self.text[name] for name in names if self.text.get(name) is not None), None)
        if value is None:
            raise ValueError(f"config.json has no {names[0]}; only decoders with attention can be planned.")
        return int(value)

    @property
    def numbers(self) -> int:
        """How many numbers all weights have."""
        return sum(map(prod, self.weights.values()))

    @property
    def outside(self) -> int:
        """How many numbers the weights outside the layers have."""
        return sum(prod(shape) for name, shape in self.weights.items() if not in_layer(name))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The training data: a number of groups, and the mean lengths in tokens of their prompts and completions."""

    groups: int
    prompt: int
    completion: int
    completions: int = 2
    longest: int = 0  # tokens of the longest group; 0: all are as long

    @property
    def tokens(self) -> int:
        """The tokens of a group: its prompt once, and its completions."""
        return self.prompt + self.completions * self.completion

    @property
    def computed(self) -> int:
        """The tokens of a group in a pack, without the last of each completion, which predicts nothing."""
        return max(1, self.tokens - self.completions)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The options of a job that affect memory. A field has the name of the job's field, if the job has it."""

    precision: Literal["float32", "bfloat16"] = "float32"
    adapter: int | None = None  # its rank; None: all weights are trained
    dropout: float = 0.0  # of what enters the adapter
    quantized: bool = False  # whether the linear layers of the adapter's base are in NF4
    targets: tuple[str, ...] | None = None  # names of modules that it adapts; None: all linear layers but the head
    num_workers: int = 1
    workers_per_node: int = 8
    sharding: Sharding = "auto"
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    max_length: int = 2048
    max_tokens_per_pack: int | None = None
    batch_size: int = 8
    n_epochs: int = 1
    rewards: bool = False  # a reward model, which has no logits
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def itemsize(self) -> int:
        return 2 if self.precision == "bfloat16" else FLOAT32


def in_layer(name: str) -> bool:
    return re.search(r"\.\d+\.", name) is not None

"""Defines the inputs of a memory plan: a model, its training rows, and the options that affect memory."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from dpo_core.config import Sharding

FLOAT32 = 4  # bytes of a gradient, of a master, and of one of AdamW's two moments


@dataclass(frozen=True)
class Shapes:
    """What a memory plan needs to know of a model: its config.json (`config`), and the shape of each weight by the
    weight's name in the safetensors files (`weights`)."""

    config: Mapping[str, Any]
    weights: Mapping[str, Sequence[int]]

    @property
    def text(self) -> dict[str, Any]:
        """The config of the model that reads texts. The config of a multimodal model has values for its text model
        under `text_config`; in the result they replace the values of the whole config."""
        return {**self.config, **(self.config.get("text_config") or {})}

    @property
    def caps_attention(self) -> bool:
        """Whether the model limits its attention scores, as Gemma 2 does. If it does, the completions of a prompt
        cannot share one copy of the prompt: each completion is computed after a copy of its own, and autograd keeps the
        attention probabilities."""
        return bool(self.text.get("attn_logit_softcapping"))

    def number(self, *names: str) -> int:
        """Returns an integer of the text model's config: the value of the first of `names` that the config has. Raises
        ValueError if the config has none of these names."""
        value = next((self.text[name] for name in names if self.text.get(name) is not None), None)
        if value is None:
            raise ValueError(
                f"config.json has no {names[0]}; memory can be planned only for decoder models with attention."
            )
        return int(value)

    @property
    def numbers(self) -> int:
        """The number of parameters in all weights of the model."""
        return sum(map(prod, self.weights.values()))

    @property
    def outside(self) -> int:
        """The number of parameters in the weights outside the model's layers, such as the embeddings and the head."""
        return sum(prod(shape) for name, shape in self.weights.items() if not in_layer(name))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The size of the training data: the number of groups (prompts with their completions), the number of completions
    in a group, and the mean lengths of prompts and completions in tokens."""

    groups: int
    prompt: int
    completion: int
    completions: int = 2
    longest: int = 0  # tokens of the longest group; 0: all groups have the mean length
    copies: bool = False  # whether each completion is computed behind its own copy of the prompt

    @property
    def tokens(self) -> int:
        """The number of tokens in a group (a prompt with its completions) whose prompt and completions have the mean
        lengths: the prompt, counted once, and all completions."""
        return self.prompt + self.completions * self.completion

    @property
    def computed(self) -> int:
        """The number of tokens that a model computes for a group (a prompt with its completions) whose prompt and
        completions have the mean lengths. The last token of each completion is left out, because it predicts
        nothing."""
        copied = (self.completions - 1) * self.prompt if self.copies else 0
        return max(1, self.tokens + copied - self.completions)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The options of a job that affect memory, such as its precision, adapter, number of workers and batch size."""

    precision: Literal["float32", "bfloat16"] = "float32"
    adapter: int | None = None  # the adapter's rank; None: all weights are trained
    dropout: float = 0.0  # share of the adapter's inputs that is left out
    quantized: bool = False  # whether the linear layers of the adapter's base are in NF4
    targets: tuple[str, ...] | None = None  # names of the adapted modules; None: all linear layers but the head
    num_workers: int = 1
    workers_per_node: int = 8
    sharding: Sharding = "auto"
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    max_length: int = 2048
    max_tokens_per_pack: int | None = None
    batch_size: int = 8
    n_epochs: int = 1
    rewards: bool = False  # whether the model is a reward model, which has no logits
    of_whole_batch: bool = False  # whether the loss of a group depends on other groups of the batch, as in KTO
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def itemsize(self) -> int:
        return 2 if self.precision == "bfloat16" else FLOAT32


def in_layer(name: str) -> bool:
    return re.search(r"\.\d+\.", name) is not None

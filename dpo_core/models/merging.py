"""Merges a trained adapter into its base (the model under it) in float32, and measures how much the merge changes the
model's outputs."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dpo_core.models.architecture import is_reward_model
from dpo_core.models.folder import processors_of, save_model
from dpo_core.models.model import agree_on_padding, load_attached, load_tokenizer

NUM_TEXTS, TEXT_TOKENS = 4, 32


@dataclass(frozen=True)
class Comparison:
    """The largest difference between the outputs of two models: a base model with an adapter on it, and the model into
    which both were merged."""

    largest_difference: float
    difference_of: Literal["logprobs", "rewards"]  # logprobs: of every token of the vocabulary, after each token
    num_tokens: int  # how many tokens, drawn at random from the vocabulary, both models have read


def merge_and_compare(adapter: Path, folder: Path, *, base: str | Path) -> Comparison:
    """Merges a trained adapter into its base model, and writes the merged float32 model into a Hugging Face folder.
    Compares the outputs before and after the merge, both in float32, and returns the largest difference.

    Raises ValueError if the adapter was not trained on this base, or if an output of the merged model is NaN or
    infinite.
    """
    model: Any = load_attached(adapter, base=base, dtype=torch.float32)
    rewards = is_reward_model(model.get_base_model())
    before = _outputs(model, rewards)
    merged = model.merge_and_unload().eval()
    difference = float((_outputs(merged, rewards) - before).abs().max())
    if not isfinite(difference):
        raise ValueError(
            f"The outputs of {adapter} merged into {base} are NaN or infinite; merge an earlier checkpoint."
        )
    save_model(merged, folder, agree_on_padding(merged, load_tokenizer(adapter)), processors_of(merged))
    return Comparison(difference, "rewards" if rewards else "logprobs", NUM_TEXTS * TEXT_TOKENS)


@torch.no_grad()
def _outputs(model: Any, rewards: bool) -> Tensor:
    """Returns a model's outputs on some random texts. If `rewards` is true, the model is a reward model and the outputs
    are rewards. If it is false, they are the log-probabilities of all possible next tokens."""
    size = model.config.get_text_config().vocab_size
    texts = torch.randint(size, (NUM_TEXTS, TEXT_TOKENS), generator=torch.Generator().manual_seed(0))
    logits = torch.cat([model(input_ids=text[None], use_cache=False).logits.float() for text in texts])
    return logits if rewards else logits.log_softmax(-1)

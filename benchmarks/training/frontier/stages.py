"""Trains models with dpo_core: the reference, the reward model, and policies with DPO and related methods."""

import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.training.frontier.task import PROMPT, WORDS, generator, sample, true_reward
from dpo_core import EncodedGroup, Optim, TrainConfig, load_tokenizer, score_reference, train
from dpo_core.options import Objective

BATCH_SIZE, MAX_LENGTH, MAX_TOKENS_PER_PACK = 128, 16, 4096


def save_random_model(folder: Path, seed: int) -> None:
    """Saves to `folder` a Llama with 112,000 random weights, and a tokenizer whose vocabulary is the twelve words of
    the task."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(WORDS), **sizes, tie_word_embeddings=True, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(folder)
    known = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="."))
    PreTrainedTokenizerFast(tokenizer_object=known, eos_token=".", pad_token="and").save_pretrained(folder)


def groups_of(texts: Tensor) -> list[EncodedGroup]:
    """Returns N groups (prompts with their completions), made from `texts` [N, k, 6]: k texts with the same prompt make
    a group of k completions. The best text of a group must come first."""
    return [
        EncodedGroup(group[0][:PROMPT], tuple(text[PROMPT:] for text in group), None, line)
        for line, group in enumerate(texts.tolist(), 1)
    ]


def preferences(reference: PreTrainedModel, prompts: Tensor, num: int, seed: int) -> Tensor:
    """Samples two answers to each of `num` prompts from the reference, and returns them as pairs [num, 2, 6].

    The first answer of a pair is the chosen one. A Bradley-Terry model with the true reward r chooses answer a, and not
    answer b, with the probability sigmoid(r_a - r_b).
    """
    rng = generator(seed)
    asked = prompts[torch.randint(len(prompts), (num,), generator=rng)]
    pairs = torch.stack([sample(reference, asked, rng) for _ in range(2)], 1)
    rewards = true_reward(pairs)
    in_order = torch.rand(num, generator=rng) < (rewards[:, 0] - rewards[:, 1]).sigmoid()
    return torch.where(in_order[:, None, None], pairs, pairs.flip(1))


def steps(
    objective: Objective,
    model: PreTrainedModel,
    groups: Sequence[EncodedGroup],
    *,
    rate: float,
    epochs: int,
    seed: int,
) -> Iterator[float]:
    """Trains `model` in place with the objective, on `epochs` passes over `groups`. Yields after each step the share of
    all steps that are done.

    If the objective needs a reference, the reference is `model` as it is before the first step. `rate` is the highest
    learning rate.
    """
    rng, batches = random.Random(seed), []
    if objective.traits.needs_other_prompts:
        groups = _with_others(groups)
    if objective.traits.needs_reference:
        groups = score_reference(model, groups, max_tokens_per_pack=MAX_TOKENS_PER_PACK)
    for _ in range(epochs):
        order = rng.sample(groups, len(groups))
        batches += [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
    config = TrainConfig(
        objective=objective,
        optim=Optim(learning_rate=rate, schedule="cosine"),
        batch_size=BATCH_SIZE,
        n_epochs=epochs,
        max_length=MAX_LENGTH,
        max_tokens_per_pack=MAX_TOKENS_PER_PACK,
        checkpoint_steps=len(batches),
    )
    tokenizer = load_tokenizer(model.name_or_path)
    with tempfile.TemporaryDirectory() as folder:
        for step in train(config, model, tokenizer, batches, total_steps=len(batches), checkpoint_dir=folder):
            yield step.step / step.total_steps


def _with_others(groups: Sequence[EncodedGroup]) -> list[EncodedGroup]:
    """Returns the pairs, each with a third completion: the chosen answer of the next pair. From these added answers,
    which have the rating nan, KTO estimates the KL divergence."""
    following = [*groups[1:], groups[0]]
    return [
        replace(group, completion_ids=(*group.completion_ids, other.completion_ids[0]), ratings=(1.0, 0.0, math.nan))
        for group, other in zip(groups, following, strict=True)
    ]

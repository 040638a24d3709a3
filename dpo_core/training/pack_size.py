"""Decides how many tokens one forward pass computes (`max_tokens_per_pack`), and whether the backward pass recomputes
activations. The number of tokens is as large as memory allows, unless a larger number is no faster on the device."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from dpo_core.config import Sharding, TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.architecture import decoder_layers, is_sharded, local_part
from dpo_core.plan.rules import PACK_SHARE, choose_pack, most_logits_bytes, most_tokens
from dpo_core.policy.attention import shared_prompts
from dpo_core.policy.scorer import Scorer
from dpo_core.training.gradients import goes_by_pack
from dpo_core.training.ranks import all_reduce_min, num_local_ranks
from dpo_core.training.weights import num_shards, state_bytes

logger = logging.getLogger(__name__)

ASSUMED_TOKENS = 8192  # in a pack, on a device other than a CPU or CUDA GPU
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
EXAMPLE_TOKENS, EXAMPLE_POSITIONS = 192, 128  # the largest example on which memory is measured


def plan_memory(config: TrainConfig, scorer: Scorer, groups: Sequence[EncodedGroup] = ()) -> TrainConfig:
    """Chooses, by the memory that is free, how many tokens one forward pass computes (`max_tokens_per_pack`) and
    whether the backward pass recomputes activations. Returns `config` with both options set. An option that the user
    has set stays as it is.

    All ranks (processes of the run) get the same values. Logs a warning if a row of `max_length` may not fit into
    memory. `groups` are examples of the training data, because the memory of a token depends on them: it is larger if
    many short completions share a long prompt.
    """
    if config.max_tokens_per_pack is not None and config.activation_checkpointing != "auto":
        return config
    model, least = scorer.model, config.max_length
    whole = not goes_by_pack(config.objective, scorer)
    most = config.max_tokens_per_pack or most_tokens(model.device.type, least, of_whole_batch=whole)
    most = most or max(least, ASSUMED_TOKENS)
    budget = _budget(scorer, config.sharding, most)
    token_bytes = _bytes_per_token(scorer, groups)
    layers = max(1, len(decoder_layers(model)))
    recomputed_bytes = token_bytes // layers + layers * _border_bytes(scorer)
    given, wanted = config.max_tokens_per_pack, config.activation_checkpointing
    tokens, choice, fits = choose_pack(
        budget, token_bytes, recomputed_bytes, given=given, wanted=wanted, least=least, most=most
    )
    if fits < least:
        logger.warning(
            "A row of max_length (%d tokens) may not fit into memory, which has room for about %d tokens; "
            "lower max_length.",
            least,
            fits,
        )
    return replace(config, max_tokens_per_pack=tokens, activation_checkpointing=choice)


def checkpoint_activations(scorer: Scorer) -> Callable[[], None]:
    """Makes the backward pass recompute each layer from the layer's input, so that autograd keeps only the inputs.
    Returns a function that ends the recomputation."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), shared_prompts(scorer.model) if scorer.shares_prompts else nullcontext()

    layers = decoder_layers(scorer.model)
    before = [vars(layer).get("forward") for layer in layers]  # a forward set by the caller, or None

    def undo() -> None:
        for layer, patch in zip(layers, before, strict=True):
            del layer.forward
            if patch is not None:
                layer.forward = patch

    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
    return undo


def _budget(scorer: Scorer, sharding: Sharding, most: int) -> int | None:
    """Returns how many bytes of memory the tokens of one forward pass, at most `most`, may take. This is a part of the
    memory that remains after weights, gradients, the optimizer's state and the logits held at a time. `sharding` is the
    option that says how the weights, the gradients and this state are split over the ranks.

    All ranks (processes of the run) get the same result, the smallest number of any rank. Returns None if the system
    does not report its memory.
    """
    model = scorer.model
    free = _free_bytes(model.device)
    if free is None:
        return None
    loaded = sum(local_part(weight).nbytes for weight in model.parameters())
    state = state_bytes(model, num_shards(scorer, sharding), scorer.dtype)
    vocabulary, capped = model.config.get_text_config().vocab_size, scorer.manner.logits.cap is not None
    head = most_logits_bytes(model.device.type, most, vocabulary, scorer.dtype.itemsize, capped=capped)
    free += loaded - state - (0 if scorer.rewards else head)
    return all_reduce_min(int(max(0, free) * PACK_SHARE), model.device)


def _free_bytes(device: torch.device) -> int | None:
    """Returns the bytes of free memory of a GPU. For a CPU, returns this process's share of the free memory of its
    machine or container. Returns None if the system does not report its memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by PyTorch's allocator
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        free = _number(MEMINFO, "MemAvailable:") * 1024
    except (OSError, KeyError):
        return None
    limit = CGROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        # Cached files do not count, as for the kubelet: the kernel frees them when it needs memory.
        used = int((CGROUP / "memory.current").read_text()) - _number(CGROUP / "memory.stat", "inactive_file")
        free = min(free, int(most) - used)
    return free // num_local_ranks()


def _number(file: Path, name: str) -> int:
    """Returns the number that follows `name` in a system file such as /proc/meminfo. Each line of the file must begin
    with a name and a number."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {name: int(number) for name, number, *_ in lines}[name]


def _example(groups: Sequence[EncodedGroup], config: PretrainedConfig) -> EncodedGroup:
    """Returns a small group (a prompt with its completions) to measure memory on. Its lengths have the proportions of
    the group in `groups` that takes the most memory per token. If `groups` is empty, the example is a prompt with two
    completions.

    A group takes the most memory per token if its number of completions times the length of its prompt is large
    relative to all its tokens. The reason is that autograd keeps a prompt's keys once for each completion.
    """

    def looks_back(group: EncodedGroup) -> float:
        return len(group.completion_ids) * len(group.prompt_ids) / group.num_tokens

    shape = max(groups, key=looks_back, default=EncodedGroup([0], ([0], [0]), None, 1))
    longest = len(shape.prompt_ids) + max(map(len, shape.completion_ids))
    positions = min(EXAMPLE_POSITIONS, getattr(config, "max_position_embeddings", None) or EXAMPLE_POSITIONS)
    scale = min(EXAMPLE_TOKENS / shape.num_tokens, positions / longest)
    lengths = (max(2, int(len(ids) * scale)) for ids in (shape.prompt_ids, *shape.completion_ids))
    prompt, *completions = ([i % config.vocab_size for i in range(length)] for length in lengths)
    return EncodedGroup(prompt, tuple(completions), None, 1)


def _bytes_per_token(scorer: Scorer, groups: Sequence[EncodedGroup] = ()) -> int:
    """Returns the bytes that autograd keeps until the backward pass for each token of a forward pass. The bytes are
    measured on a small example whose lengths have the proportions of `groups`, examples of the training data."""
    example = _example(groups, scorer.model.config.get_text_config())
    return -(-_kept_bytes(scorer, example) // scorer.count_tokens(example))


def _border_bytes(scorer: Scorer) -> int:
    """Returns the bytes that autograd keeps for each token in each layer, even if the backward pass recomputes layers.
    These are the layer's input and, if training balances experts, what the balancing loss needs of the layer's router.
    """
    layer_input: int = scorer.model.config.get_text_config().hidden_size * scorer.dtype.itemsize
    return layer_input + (scorer.experts.bytes_per_token(scorer.dtype) if scorer.experts else 0)


def _kept_bytes(scorer: Scorer, group: EncodedGroup) -> int:
    """Runs a forward pass of the group (a prompt with its completions), and returns the bytes that autograd keeps for
    the backward pass. The bytes of the model's weights are not included."""
    unchanging = None if is_sharded(scorer.model) else _storages(scorer.model)
    kept_storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        weights = _storages(scorer.model) if unchanging is None else unchanging  # shards are gathered layer by layer
        if storage.data_ptr() not in weights:
            kept_storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        measured = scorer(scorer.collate([group]))
    del measured
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # as a backward pass would
    return sum(kept_storages.values())


def _storages(model: PreTrainedModel) -> set[int]:
    """Returns the addresses of the memory blocks that hold the model's weights. Weights that this rank (process of the
    run) does not have in memory now are left out."""
    return {local_part(weight).untyped_storage().data_ptr() for weight in model.parameters()}

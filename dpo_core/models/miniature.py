"""Builds a small float32 model with the architecture and options of a large model, for quick experiments.

The attention windows and chunks of the small model are very short. A few tokens therefore show effects that the large
model shows only in long texts.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dpo_core.models.architecture import device_of

MOST_KINDS = 8  # kinds of layers in a miniature
MOST_WEIGHTS = 1_000_000_000
# The names of config fields, and the largest value that each has in a miniature.
_AT_MOST = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "depth": 1,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    # The fields below say which layers have experts; a miniature has only the first layers.
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "decoder_sparse_step": 2,
    # The fields below have no effect on texts shorter than their value: windows, chunks between which a state is passed
    # on, the number of keys that sparse attention chooses, and the tokens after which a scale of positions grows.
    "sliding_window": 4,
    "sliding_window_size": 4,
    "attention_window_size": 4,
    "attention_chunk_size": 4,
    "local_attention": 8,
    "window_size": 4,
    "keep_window_size": 4,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "index_topk": 4,
    "floor_scale": 4,
}


def miniature(model: PreTrainedModel, *, narrow: bool) -> PreTrainedModel:
    """Returns a small copy of the model with random weights. The copy has one layer of each kind that the model has,
    and at least two layers.

    With `narrow` the copy also has fewer attention heads. If the architecture does not accept such a small config, the
    exception of the architecture's own code is passed on.
    """
    config = deepcopy(model.config)
    for part in _parts(config):
        _cut(part)
        if narrow:
            _narrow(part)
    with torch.device("meta"):
        num_weights = sum(parameter.numel() for parameter in type(model)(config).parameters())
    if num_weights > MOST_WEIGHTS:
        raise ValueError(
            f"the small copy of the model would have {num_weights} weights; at most {MOST_WEIGHTS} are allowed"
        )
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        small = type(model)(config).float().eval()
        _randomize(small)
    return small.requires_grad_(False)


def _parts(config: PretrainedConfig) -> Iterator[Any]:
    """Yields a model's config and the configs within it, such as that of an image encoder."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _cut(config: Any) -> None:
    """Makes the sizes in a model's config very small, so that the config is that of a miniature model. Does not change
    the number and the width of the attention heads."""
    config.dtype = torch.float32
    for name, most in _AT_MOST.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value > most:
            setattr(config, name, most)
    if isinstance(getattr(config, "pad_token_id", None), int):
        config.pad_token_id = min(config.pad_token_id, _AT_MOST["vocab_size"] - 1)
    for rope in ropes(config):
        if "llama_4_scaling_beta" in rope:
            rope["original_max_position_embeddings"] = _AT_MOST["floor_scale"]
    _cut_layers(config)


def _narrow(config: Any) -> None:
    """Lowers the number of key-value heads in a model's config to at most two. Lowers the number of query heads and the
    hidden size in the same proportion."""
    heads: int = getattr(config, "num_attention_heads", None) or 1
    keys: int = getattr(config, "num_key_value_heads", None) or heads
    if heads % keys or config.hidden_size % heads:
        return
    fewer = min(keys, 2)
    config.hidden_size = config.hidden_size // keys * fewer
    for name, count in {"num_attention_heads": heads // keys * fewer, "num_key_value_heads": fewer}.items():
        if getattr(config, name, None):
            setattr(config, name, count)


def ropes(config: Any) -> list[dict[str, Any]]:
    """Returns the options of rotary positions in a model's config: first those for all layers, then those for each kind
    of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]


def _cut_layers(config: Any) -> None:
    """Keeps only the first layer of each kind in a model's config. Lists in the config that have an entry for each
    layer keep only the entries of these layers."""
    count = getattr(config, "num_hidden_layers", 0)
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == count}
    kinds = list(zip(*(v for v in lists.values() if len(set(map(str, v))) <= MOST_KINDS), strict=True)) or [()] * count
    first = {str(kind): layer for layer, kind in reversed(list(enumerate(kinds)))}
    kept_layers = sorted(first.values())[:MOST_KINDS]
    kept_layers = kept_layers if len(kept_layers) > 1 else list(range(count))[:2]
    for name, value in lists.items():
        setattr(config, name, [value[layer] for layer in kept_layers])
    if count > len(kept_layers):
        config.num_hidden_layers = len(kept_layers)


def _randomize(model: PreTrainedModel) -> None:
    """Draws random weights for a model, such that every weight affects the model's answers: inner products are about 1,
    logits vary, and no bias is 0."""
    spreads = {id(module.weight): 1.0 for module in model.modules() if isinstance(module, nn.Embedding)}
    if head := model.get_output_embeddings():
        spreads[id(head.weight)] = 4 * head.weight.shape[-1] ** -0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.normal_(0, spreads.get(id(parameter), parameter.shape[-1] ** -0.5))

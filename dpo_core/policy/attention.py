"""Computes attention for prompts and completions that lie end to end in one row of tokens (the stream). A completion
sees only its prompt and itself, so several completions can share one prompt.

The module registers this attention with transformers under a new name. Every architecture that calls attention through
`ALL_ATTENTION_FUNCTIONS` can use it. transformers builds no mask for an attention with an unknown name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

NAME = "shared_prompts"
Segments = tuple[tuple[int, int, int, int], ...]  # start and stop of the prefix, start and stop of the segment


@contextmanager
def shared_prompts(policy: PreTrainedModel) -> Iterator[None]:
    """Replaces the policy's attention by `segment_attention` in the `with` block. In the block, the policy's forward
    takes the argument `segments`, which says which completion sees which prompt. Raises ValueError if the policy's
    attention cannot be replaced."""
    before = policy.config._attn_implementation
    policy.set_attn_implementation(NAME)
    if policy.config._attn_implementation != NAME:
        raise ValueError(f"transformers cannot replace the attention function of {type(policy).__name__}")
    try:
        yield
    finally:
        policy.set_attn_implementation(before)


def segment_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, width]
    key: Tensor,  # [1, key-value heads, T, width]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Computes the attention of each segment's queries to the segment's prompt and to the segment itself. Returns the
    results for T tokens, [1, T, heads, width], and None in place of attention weights.

    A segment is a range of the T tokens: a prompt with its first completion, or a further completion of this prompt.
    One call computes all segments if flash attention suits the tensors; if it does not, each segment needs a call of
    its own. `scaling` is the factor on the attention scores (None: 1 / sqrt(width)). `sliding_window` is the number of
    keys that a query sees (None: all earlier keys). `module` is the attention layer. Raises ValueError without
    `segments`, and for arguments that this attention does not support: a mask, dropout, and most arguments of special
    architectures.
    """
    unusable = [name for name, given in kwargs.items() if name not in _CHANGES_NOTHING and given is not None]
    unusable += ["a mask"] * (attention_mask is not None) + ["dropout"] * bool(dropout)
    if segments is None:
        raise ValueError("The model passes no segments to its attention, which needs them to share prompts.")
    if unusable:
        raise ValueError(f"Attention that shares prompts cannot use {', '.join(unusable)}.")
    attend = _at_once if _suits_flash(query, value) else _one_by_one
    return attend(query, key, value, segments, scaling, sliding_window), None


# Arguments that architectures pass and that do not change what attention computes. Any other argument may change the
# result, such as a cap of the scores, a sink, a bias or a choice of keys; such an architecture cannot share prompts.
_CHANGES_NOTHING = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}


def _suits_flash(query: Tensor, value: Tensor) -> bool:
    """Whether flash attention can compute `query` and `value`, judging by their device, dtype and width. Only flash
    attention computes segments (ranges of tokens) of different lengths in one call."""
    width = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and width <= 256
        and width % 8 == 0
        and value.shape[-1] == width
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _at_once(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    seen, query_edges, key_edges, most_queries, most_keys = _lay_out(segments, query.device)
    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, seen),
        value[0].transpose(0, 1).index_select(0, seen),
        query_edges,
        key_edges,
        most_queries,
        most_keys,
        scale=scaling,
        # How far back and ahead a query sees. Flash attention aligns the last query with the last key, so keys of the
        # prefix come before those of the segment.
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, attended)[None]


@lru_cache(maxsize=1)  # all layers of a forward call this with the same arguments
def _lay_out(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Returns the arguments that one call of flash attention (`varlen_attn`) needs for S segments. A segment is a range
    of tokens in the row of all tokens. It sees its own tokens and those of its prompt.

    - `seen`: the positions in the row of all keys, segment after segment, int64
    - `cu_seqlens_q`: where the queries of each segment begin, and the end of the last, [S + 1] int32
    - `cu_seqlens_k`: where the keys of each segment begin in `seen`, and the end of the last, [S + 1] int32
    - `max_seqlen_q`: the largest number of queries in a segment
    - `max_seqlen_k`: the largest number of keys that a segment sees
    """
    ranges = [torch.arange(*ends) for segment in segments for ends in (segment[:2], segment[2:])]
    num_queries = [stop - start for _, _, start, stop in segments]
    num_keys = [prefix_stop - prefix_start + stop - start for prefix_start, prefix_stop, start, stop in segments]
    edges = (torch.tensor([0, *accumulate(sizes)], dtype=torch.int32) for sizes in (num_queries, num_keys))
    tensors = [torch.cat(ranges), *edges]
    if device.type != "cpu":  # a copy from pinned memory does not block the host
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    seen, query_edges, key_edges = tensors
    return seen, query_edges, key_edges, max(num_queries), max(num_keys)


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, sliding_window: int | None
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    grouped = repeats > 1 and query.device.type == "cpu"  # on other devices few SDPA kernels group heads
    if repeats > 1 and not grouped:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    # The gradient of one split is one concatenation, while the gradient of each slice would be a whole stream of zeros.
    cuts = sorted({edge for segment in segments for edge in segment})
    place = {cut: index for index, cut in enumerate(cuts)}
    sizes = [stop - start for start, stop in pairwise(cuts)]
    key_parts, value_parts = key.split_with_sizes(sizes, 2), value.split_with_sizes(sizes, 2)
    queries = query.split_with_sizes([stop - start for _, _, start, stop in segments], 2)
    masks = _masks(segments, sliding_window, query.dtype, query.device)
    outputs = []
    for segment_queries, mask, (prefix_start, prefix_stop, start, stop) in zip(queries, masks, segments, strict=True):
        seen = [*range(place[prefix_start], place[prefix_stop]), *range(place[start], place[stop])]
        keys = torch.cat([key_parts[i] for i in seen], 2)
        values = torch.cat([value_parts[i] for i in seen], 2)
        attended = scaled_dot_product_attention(
            segment_queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(attended.transpose(1, 2))
    return torch.cat(outputs, 1)  # contiguous, as some architectures expect


@lru_cache(maxsize=2)  # all layers call this with the same arguments, but some may have a window
def _masks(
    segments: Segments, sliding_window: int | None, dtype: torch.dtype, device: torch.device
) -> list[Tensor | None]:
    """Returns for each segment (range of tokens) the mask to add to its attention scores. For a segment that needs no
    mask, because causal attention is enough, the list has None. `sliding_window` is the number of keys that a query
    sees, None if it sees all earlier keys.

    A mask has numbers and not booleans, because in the backward pass all layers share one mask of numbers, while SDPA
    would keep a copy of a boolean mask for each layer.
    """
    masks: list[Tensor | None] = []
    for prefix_start, prefix_stop, start, stop in segments:
        prefix = prefix_stop - prefix_start
        length = prefix + stop - start
        window = sliding_window if sliding_window and sliding_window < length else None
        if prefix == 0 and window is None:
            masks.append(None)
        else:
            seen = _mask(prefix, length, window, device)
            masks.append(torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf))
    return masks


def _mask(prefix: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Returns which query of a segment (a range of tokens) sees which key, as booleans [length - prefix, length]. The
    keys are `length` tokens: the first `prefix` tokens are the prompt, the others are the segment, whose tokens are the
    queries. With a `window`, a query sees only the last `window` keys up to itself."""
    queries = torch.arange(prefix, length, device=device)[:, None]
    keys = torch.arange(length, device=device)
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


AttentionInterface.register(NAME, segment_attention)

"""Attention over a stream of segments: completions see their prompt and themselves, and nothing else.

Registered with transformers under its own name, so that every architecture that attends through
`ALL_ATTENTION_FUNCTIONS` can use it. transformers builds no mask for a name it has no mask for.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

NAME = "shared_prompts"
Segments = Sequence[tuple[int, int, int, int]]  # prefix start and stop, own start and stop


@contextmanager
def shared_prompts(policy: PreTrainedModel) -> Iterator[None]:
    """Within, a forward of the policy takes `segments=` and attends by them. Raises ValueError where it cannot."""
    before = policy.config._attn_implementation
    policy.set_attn_implementation(NAME)
    if policy.config._attn_implementation != NAME:
        raise ValueError(f"the attention of {type(policy).__name__} cannot be replaced")
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
    """One SDPA call per segment; returns [1, T, heads, width]."""
    unknown = {name for name, given in kwargs.items() if name in _CHANGES_RESULT and given is not None}
    if segments is None or attention_mask is not None or dropout or unknown:
        raise ValueError(f"Attention over segments got no segments, a mask, dropout or {sorted(unknown)}.")
    repeats = query.shape[1] // key.shape[1]
    grouped = repeats > 1 and query.device.type == "cpu"  # elsewhere SDPA groups heads in few of its kernels
    if repeats > 1 and not grouped:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    # Cut once: the gradient of a split is one concatenation, that of a slice a whole stream of zeros.
    cuts = sorted({edge for segment in segments for edge in segment})
    place = {cut: index for index, cut in enumerate(cuts)}
    sizes = [stop - start for start, stop in pairwise(cuts)]
    key_parts, value_parts = key.split_with_sizes(sizes, 2), value.split_with_sizes(sizes, 2)
    queries = query.split_with_sizes([stop - start for _, _, start, stop in segments], 2)
    outputs = []
    for own, (prefix_start, prefix_stop, start, stop) in zip(queries, segments, strict=True):
        seen = [*range(place[prefix_start], place[prefix_stop]), *range(place[start], place[stop])]
        keys = torch.cat([key_parts[i] for i in seen], 2)
        values = torch.cat([value_parts[i] for i in seen], 2)
        length = keys.shape[2]
        window = sliding_window if sliding_window and sliding_window < length else None
        plain = prefix_start == prefix_stop and window is None
        mask = None if plain else _mask(length - own.shape[2], length, window, query.device)
        outputs.append(
            scaled_dot_product_attention(
                own, keys, values, attn_mask=mask, is_causal=plain, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2), None


# Arguments by which some architectures change what attention computes; sharing is not for them.
_CHANGES_RESULT = {"softcap", "s_aux", "position_bias", "cache"}


def _mask(prefix: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """[length - prefix, length] true where the query at position `prefix + row` sees the key at position `column`."""
    queries = torch.arange(prefix, length, device=device)[:, None]
    keys = torch.arange(length, device=device)
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


AttentionInterface.register(NAME, segment_attention)

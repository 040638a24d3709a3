from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.policy import attention
from dpo_core.policy.attention import segment_attention, shared_prompts
from dpo_core.policy.batch import Segment, collate
from dpo_core.policy.scorer import Scorer

SEGMENTS = (Segment(0, 0, 0, 5), Segment(0, 3, 5, 9), Segment(9, 9, 9, 10))


def streams(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 10, 8, dtype=dtype, generator=g)
    key, value = (torch.randn(1, 2, 10, 8, dtype=dtype, generator=g) for _ in range(2))
    return query, key, value


def whole_mask(window: int = 100) -> torch.Tensor:
    """Returns a mask [10, 10]: which query (row) sees which key (column), by the positions of `SEGMENTS`."""
    mask = torch.zeros(10, 10, dtype=torch.bool)
    for segment in SEGMENTS:
        seen = [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, segment.stop)]
        for query in range(segment.start, segment.stop):
            place = seen.index(query)
            mask[query, seen[max(0, place - window + 1) : place + 1]] = True
    return mask


@pytest.mark.parametrize("window", [None, 2, 4])
def test_segments_attend_to_their_prompt_and_themselves_and_nothing_else(window):
    query, key, value = streams()
    ours, _ = segment_attention(
        torch.nn.Module(), query, key, value, None, segments=SEGMENTS, scaling=0.3, sliding_window=window
    )
    repeated = [t.repeat_interleave(2, 1) for t in (key, value)]
    theirs = scaled_dot_product_attention(query, *repeated, attn_mask=whole_mask(window or 100), scale=0.3)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


@pytest.mark.parametrize(
    "unusable",
    [{"segments": None}, {"dropout": 0.1}, {"softcap": 30.0}, {"attention_mask": torch.ones(1)}],
    ids=lambda given: next(iter(given)),
)
def test_arguments_that_attention_over_segments_cannot_use_are_refused(unusable):
    arguments = {"segments": SEGMENTS, "attention_mask": None} | unusable
    with pytest.raises(ValueError, match=r"shares? prompts"):
        segment_attention(torch.nn.Module(), *streams(), **arguments)


def test_a_policy_attends_as_before_once_sharing_ends(policy):
    ids = torch.arange(5, 15)[None]
    before = policy(input_ids=ids).logits
    with shared_prompts(policy), pytest.raises(ValueError, match="no segments"):
        policy(input_ids=ids)
    torch.testing.assert_close(policy(input_ids=ids).logits, before, rtol=0, atol=0)


def flash_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """Computes what the documentation of torch's `varlen_attn` says: masks are aligned to the bottom right of each
    sequence."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    outputs = []
    for (start, stop), (first, last) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        rows = torch.arange(stop - start)[:, None] + (last - first) - (stop - start)
        columns = torch.arange(last - first)
        seen = (columns <= rows + right) & ((columns >= rows - left) | (left < 0))
        keys, values = (t[first:last].repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
        scores = torch.einsum("qhw,khw->hqk", query[start:stop], keys) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khw->qhw", weights, values))
    return torch.cat(outputs)


@contextmanager
def one_call() -> Iterator[None]:
    """Makes attention take the path for GPUs in the block, with `flash_by_hand` in place of the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", flash_by_hand)
        patch.setattr(attention, "_suits_flash", lambda query, value: True)
        yield


def attended(query, key, value, segments, window):
    """Returns the output of attention and the gradients of its inputs, with another weight for every number of the
    output."""
    inputs = [t.detach().requires_grad_() for t in (query, key, value)]
    output, _ = segment_attention(
        torch.nn.Module(), *inputs, None, segments=segments, scaling=0.3, sliding_window=window
    )
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    return [output.detach(), *torch.autograd.grad((output.flatten() * weights).sum(), inputs)]


def segments_of(groups):
    """Returns the segments of groups, each given as the length of its prompt and those of its completions."""
    encoded = [
        EncodedGroup([5] * prompt, tuple([5] * length for length in lengths), None, 1) for prompt, lengths in groups
    ]
    return collate(encoded).segments


def random_streams(length, *, key_heads, width, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(length)
    heads = (4, key_heads, key_heads)
    return [torch.randn(1, h, length, width, generator=g, dtype=torch.float64).to(device, dtype) for h in heads]


LENGTHS = st.integers(1, 7)


@given(
    groups=st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, min_size=1, max_size=4)), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 16),
    key_heads=st.sampled_from([1, 2, 4]),
)
def test_one_call_for_all_segments_is_one_call_for_each_in_values_and_gradients(groups, window, key_heads):
    segments = segments_of(groups)
    tensors = random_streams(segments[-1].stop, key_heads=key_heads, width=8)
    expected = attended(*tensors, segments, window)
    with one_call():
        found = attended(*tensors, segments, window)
    torch.testing.assert_close(found, expected)


def test_one_call_serves_layers_with_and_without_windows_and_lays_segments_out_once(pairs, sizes):
    torch.manual_seed(0)
    own = {"num_hidden_layers": 4, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = Gemma3TextConfig(**(sizes | {"initializer_range": 0.3} | own))
    scorer = Scorer(AutoModelForCausalLM.from_config(config).eval())
    batch = scorer.collate(pairs)
    expected, _ = scorer.token_logps(batch)
    attention._lay_out.cache_clear()
    with one_call():
        found, _ = scorer.token_logps(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert attention._lay_out.cache_info()[:2] == (3, 1)


@pytest.mark.parametrize(
    ("differs", "suits"),
    [
        ({}, True),
        ({"width": 256}, True),
        ({"device": "cpu"}, False),
        ({"dtype": torch.float32}, False),
        ({"width": 264}, False),
        ({"width": 84}, False),
        ({"value_width": 32}, False),
        ({"capability": (7, 5)}, False),
    ],
    ids=str,
)
def test_flash_attention_is_for_half_precision_and_heads_that_its_kernels_know(differs, suits, monkeypatch):
    a = {"device": "cuda", "dtype": torch.bfloat16, "width": 64, "value_width": None, "capability": (9, 0)} | differs
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: a["capability"])
    query, value = (
        SimpleNamespace(device=torch.device(a["device"]), dtype=a["dtype"], shape=(1, 4, 10, width))
        for width in (a["width"], a["value_width"] or a["width"])
    )
    assert attention._suits_flash(query, value) == suits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 2, 48])
@pytest.mark.parametrize(("key_heads", "width"), [(4, 64), (2, 128), (1, 256)])
def test_on_a_gpu_half_precision_agrees_with_float32_and_does_not_wait(key_heads, width, window):
    segments = segments_of([(70, [40, 1, 130]), (1, [1, 9]), (200, [65, 64]), (3, [300])])
    length = segments[-1].stop
    tensors = random_streams(length, key_heads=key_heads, width=width, dtype=torch.bfloat16, device="cuda")
    assert attention._suits_flash(tensors[0], tensors[2])
    attention._lay_out.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = attended(*tensors, segments, window)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = attended(*(t.float() for t in tensors), segments, window)
    for ours, theirs in zip(found, expected, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 0.02


def test_all_layers_keep_one_mask_for_backward(make_policy):
    prompt, completions = list(range(5, 45)), (list(range(50, 80)), list(range(90, 115)))
    scorer = Scorer(make_policy(num_hidden_layers=4))
    batch = scorer.collate([EncodedGroup(prompt, completions, None, 1)])
    masks = set()

    def keep(tensor):
        if tensor.shape[-2:] == (len(completions[1]) - 1, len(prompt) + len(completions[1]) - 1):
            masks.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = scorer(batch)
    assert found.requires_grad
    assert len(masks) == 1

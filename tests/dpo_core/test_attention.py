import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dpo_core.attention import segment_attention, shared_prompts
from dpo_core.batch import Segment

SEGMENTS = (Segment(0, 0, 0, 5), Segment(0, 3, 5, 9), Segment(9, 9, 9, 10))


def streams(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 10, 8, dtype=dtype, generator=g)
    key, value = (torch.randn(1, 2, 10, 8, dtype=dtype, generator=g) for _ in range(2))
    return query, key, value


def whole_mask(window: int = 100) -> torch.Tensor:
    """[10, 10] who sees whom in the whole stream, by the positions of `SEGMENTS`."""
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
def test_what_segments_cannot_do_is_refused(unusable):
    given = {"segments": SEGMENTS, "attention_mask": None} | unusable
    with pytest.raises(ValueError, match="Attention over segments"):
        segment_attention(torch.nn.Module(), *streams(), **given)


def test_a_policy_attends_as_before_once_sharing_ends(policy):
    ids = torch.arange(5, 15)[None]
    before = policy(input_ids=ids).logits
    with shared_prompts(policy), pytest.raises(ValueError, match="no segments"):
        policy(input_ids=ids)
    torch.testing.assert_close(policy(input_ids=ids).logits, before, rtol=0, atol=0)

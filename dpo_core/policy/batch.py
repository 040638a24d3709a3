"""Groups become packs: one stream of tokens under a budget, no padding, each prompt once."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from heapq import heapreplace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_core.encoding.encode import EncodedGroup


def plan(lengths: Sequence[int], *, num_ranks: int, max_tokens_per_pack: int) -> list[list[list[int]]]:
    """Which groups go where: `[rank][pack]` -> indices into `lengths`.

    Every rank gets the same number of packs, some perhaps empty, and about the same number of
    tokens. A group over the budget stands alone in its pack. Pure, so all ranks plan alike.
    """
    costs = [min(length, max_tokens_per_pack) for length in lengths]
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def balanced(packs_per_rank: int) -> list[list[int]] | None:
        return _balance(costs, longest_first, num_ranks * packs_per_rank, max_tokens_per_pack)

    least = max(1, -(-sum(costs) // (num_ranks * max_tokens_per_pack)))
    packs = balanced(_first(lambda number: balanced(number) is not None, least))
    assert packs is not None
    packs.sort(key=lambda pack: -sum(lengths[i] for i in pack))
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for turn, pack in enumerate(packs):  # dealt there and back, so that no rank always gets the heavier
        back, rank = divmod(turn, num_ranks)
        ranks[num_ranks - 1 - rank if back % 2 else rank].append(pack)
    return ranks


def _first(fits: Callable[[int], bool], least: int) -> int:
    """From `least` on, the first that fits: tried in growing strides, then between the last two."""
    start, found, stride = least, least, 1
    while not fits(found):
        start, found, stride = found + 1, found + stride, 2 * stride
    return bisect_left(range(found), True, start, key=fits)


def _balance(costs: Sequence[int], longest_first: Sequence[int], num_packs: int, most: int) -> list[list[int]] | None:
    """Each to the pack that is the lightest so far; None: one would have more than `most`."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    loads = [(0, number) for number in range(num_packs)]
    for i in longest_first:
        load, lightest = loads[0]
        if load + costs[i] > most:
            return None
        packs[lightest].append(i)
        heapreplace(loads, (load + costs[i], lightest))
    return packs


def batches_of_like_lengths(lengths: Sequence[int], least_fill: float) -> list[list[int]]:
    """Indices into `lengths`, together as long as that share of the batch, padded to its longest, is no padding."""
    batches: list[list[int]] = []
    longest = total = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total += lengths[i]
        if not batches or total < least_fill * longest * (len(batches[-1]) + 1):
            longest = total = lengths[i]
            batches.append([])
        batches[-1].append(i)
    return batches


class Segment(NamedTuple):
    """Tokens [start, stop) of the stream attend causally to themselves and, before that, to all of
    [prefix_start, prefix_stop): the prompt that the completion shares with an earlier one."""

    prefix_start: int
    prefix_stop: int
    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """One pack. T tokens in the stream, R learned tokens, K completions.

    The last token of a completion predicts nothing and is left out of the stream, unless `with_ends`:
    a reward is read there.
    """

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T]; every completion restarts after its prompt
    segments: tuple[Segment, ...]  # cover the stream in its order
    rows: Tensor  # [R] place in the stream whose hidden state predicts the target
    targets: Tensor  # [R] token ids of the completions, but for what others say in them
    completion_of_row: Tensor  # [R] in 0..K-1
    in_head: Tensor  # [R] whether the token is no later than the group's shortest completion is long
    num_completion_tokens: Tensor  # [K]
    ends: Tensor  # [K] place in the stream of the last token of each completion; empty without ends

    @property
    def num_completions(self) -> int:
        return len(self.num_completion_tokens)

    def to(self, device: torch.device) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def collate(groups: Sequence[EncodedGroup], *, share_prompts: bool = True, with_ends: bool = False) -> Batch:
    """Lay groups end to end. Without sharing, the prompt stands before each of its completions."""
    ids: list[Sequence[int]] = []
    positions: list[range] = []
    segments: list[Segment] = []
    rows: list[Sequence[int]] = []
    targets: list[Sequence[int]] = []
    ends: list[int] = []
    stop = 0
    for group in groups:
        prompt = len(group.prompt_ids)
        first = stop  # where the prompt at hand begins
        for j, completion in enumerate(group.completion_ids):
            shared = share_prompts and j > 0
            if not shared:
                first = stop
                ids.append(group.prompt_ids)
                positions.append(range(prompt))
                stop += prompt
            kept = completion if with_ends else completion[:-1]
            start, stop = stop, stop + len(kept)
            ids.append(kept)
            positions.append(range(prompt, prompt + len(kept)))
            predictors = [first + prompt - 1, *range(start, start + len(completion) - 1)]
            learned = group.learned(j)
            rows.append([predictors[i] for i in learned])
            targets.append([completion[i] for i in learned])
            ends += [stop - 1] if with_ends else []
            if not shared:
                segments.append(Segment(first, first, first, stop))
            elif stop > start:
                segments.append(Segment(first, first + prompt, start, stop))
    lengths = torch.tensor([len(own) for own in targets], dtype=torch.int64)
    completion_of_row = torch.repeat_interleave(torch.arange(len(targets)), lengths)
    heads = torch.tensor([group.head_length for group in groups for _ in group.completion_ids], dtype=torch.int64)
    places = torch.arange(len(completion_of_row)) - (lengths.cumsum(0) - lengths)[completion_of_row]
    return Batch(
        input_ids=_joined(ids),
        position_ids=_joined(positions),
        segments=tuple(segments),
        rows=_joined(rows),
        targets=_joined(targets),
        completion_of_row=completion_of_row,
        in_head=places < heads[completion_of_row],
        num_completion_tokens=lengths,
        ends=torch.tensor(ends, dtype=torch.int64),
    )


def _joined(parts: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64)

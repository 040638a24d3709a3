"""Forms packs from groups. A group is a prompt with its completions. A pack holds the groups that go through one
forward pass together; they are laid end to end in one row of tokens (the stream).

A pack has a limited number of tokens and no padding. If the model allows it, the completions of a group share one copy
of their prompt.
"""

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
    """Distributes groups (prompts with their completions) over ranks (processes) and packs. A pack holds the groups
    that go through one forward pass together. `lengths` has the number of tokens of each group. In the result,
    `plan[rank][pack]` is the list of the pack's groups, as indices into `lengths`.

    Every rank gets the same number of packs, some of which may be empty, and about the same number of tokens. A pack
    has at most `max_tokens_per_pack` tokens. A group that is longer is alone in its pack. The result depends only on
    the arguments, so every rank computes the same result.
    """
    costs = [min(length, max_tokens_per_pack) for length in lengths]
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def balanced(packs_per_rank: int) -> list[list[int]] | None:
        return _balance(costs, longest_first, num_ranks * packs_per_rank, max_tokens_per_pack)

    fewest = max(1, -(-sum(costs) // (num_ranks * max_tokens_per_pack)))
    packs = balanced(_first(lambda number: balanced(number) is not None, fewest))
    assert packs is not None
    packs.sort(key=lambda pack: -sum(lengths[i] for i in pack))
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for turn, pack in enumerate(
        packs
    ):  # to the ranks in turn, then in reverse, so that no rank always gets the heavier pack
        back, rank = divmod(turn, num_ranks)
        ranks[num_ranks - 1 - rank if back % 2 else rank].append(pack)
    return ranks


def _first(fits: Callable[[int], bool], least: int) -> int:
    """Returns the smallest number from `least` on for which `fits` is true. `fits` must also be true for all larger
    numbers. Doubles the stride until a number fits, then bisects."""
    start, candidate, stride = least, least, 1
    while not fits(candidate):
        start, candidate, stride = candidate + 1, candidate + stride, 2 * stride
    return bisect_left(range(candidate), True, start, key=fits)


def _balance(costs: Sequence[int], longest_first: Sequence[int], num_packs: int, most: int) -> list[list[int]] | None:
    """Distributes groups (prompts with their completions) over `num_packs` packs. A pack holds the groups that go
    through one forward pass together.

    `costs` has the number of tokens of each group. `longest_first` has the groups' indices into `costs`, the longest
    group first. In this order, each group goes into the pack that has the fewest tokens so far.

    Returns the packs as lists of indices into `costs`. Returns None if a pack would have more than `most` tokens.
    """
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
    """Sorts sequences into batches of similar lengths, and returns each batch as a list of indices into `lengths`. The
    caller pads a batch to its longest sequence. At least the share `least_fill` (from 0 to 1) of the tokens of a padded
    batch are real tokens, and not padding."""
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
    """A range [start, stop) in the row of tokens that one forward pass computes: a prompt with its first completion, or
    a further completion of the same prompt.

    Each token attends to earlier tokens of its own segment. The tokens of a further completion also attend to the
    prompt, which is the range [prefix_start, prefix_stop). This range is empty in a segment that begins with its
    prompt.
    """

    prefix_start: int
    prefix_stop: int
    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """The tensors of one pack. A pack holds the groups (prompts with their completions) that go through one forward
    pass together. It has T tokens, which lie in one row (the stream), and K completions. R of the tokens to predict
    count in the loss.

    The last token of a completion predicts nothing, so the stream leaves it out. If `collate` makes the batch with
    `with_ends`, the stream includes it, because a reward model's reward is read there.
    """

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T]; every completion's positions continue its prompt's
    segments: tuple[Segment, ...]  # cover the stream, in the order of its tokens
    rows: Tensor  # [R] place in the stream whose hidden state predicts a token in the loss
    targets: Tensor  # [R] ids of the tokens in the loss
    completion_of_row: Tensor  # [R] in 0..K-1
    in_head: Tensor  # [R] whether the token is within the length of the group's shortest completion
    num_completion_tokens: Tensor  # [K] tokens in the loss of each completion
    ends: Tensor  # [K] place in the stream of the last token of each completion; empty without `with_ends`

    @property
    def num_completions(self) -> int:
        return len(self.num_completion_tokens)

    def to(self, device: torch.device) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def collate(groups: Sequence[EncodedGroup], *, share_prompts: bool = True, with_ends: bool = False) -> Batch:
    """Lays groups (prompts with their completions) end to end in one row of tokens, and returns the tensors for one
    forward pass. Without `share_prompts`, each completion has its own copy of the prompt. The last token of each
    completion is left out, because nothing is predicted from it; `with_ends` keeps it."""
    ids: list[Sequence[int]] = []
    positions: list[range] = []
    segments: list[Segment] = []
    rows: list[Sequence[int]] = []
    targets: list[Sequence[int]] = []
    ends: list[int] = []
    stop = 0
    for group in groups:
        prompt = len(group.prompt_ids)
        first = stop  # where the current copy of the prompt begins
        for j, completion in enumerate(group.completion_ids):
            shared = share_prompts and j > 0
            if not shared:
                first = stop
                ids.append(group.prompt_ids)
                positions.append(range(prompt))
                stop += prompt
            streamed = completion if with_ends else completion[:-1]
            start, stop = stop, stop + len(streamed)
            ids.append(streamed)
            positions.append(range(prompt, prompt + len(streamed)))
            predictors = [first + prompt - 1, *range(start, start + len(completion) - 1)]
            learned = group.learned(j)
            rows.append([predictors[i] for i in learned])
            targets.append([completion[i] for i in learned])
            ends += [stop - 1] if with_ends else []
            if not shared:
                segments.append(Segment(first, first, first, stop))
            elif stop > start:
                segments.append(Segment(first, first + prompt, start, stop))
    lengths = torch.tensor([len(learned_ids) for learned_ids in targets], dtype=torch.int64)
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

"""Computes the gradient of the loss for one optimizer step, one pack at a time. A pack holds the groups (prompts with
their completions) that go through one forward pass together."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.adapter import dropouts
from dpo_core.models.architecture import is_sharded
from dpo_core.objectives.losses import Statistics, denominator, losses
from dpo_core.options import Objective
from dpo_core.policy.batch import Batch
from dpo_core.policy.measures import Measures
from dpo_core.policy.scorer import Scorer
from dpo_core.training.load_ahead import LoadIds, load_groups
from dpo_core.training.ranks import all_reduce_sum, num_ranks, rank, within_memory


@dataclass(frozen=True)
class Pack:
    """A pack: those groups (prompts with their completions) of an optimizer step that go through one forward and one
    backward pass together, as a batch of tensors.

    If the model is sharded, all ranks (processes of the run) must run every forward pass together. If a rank of a
    sharded model has no groups for a pack, it runs a group of another pack and drops the result.
    """

    groups: Sequence[EncodedGroup]  # empty for a pack that only takes part in the forwards of other ranks
    places: list[int]  # places of the pack's completions in the step's table of measures
    batch: Batch
    seed: int  # of the adapter's dropout in this pack


def own_groups(scorer: Scorer, groups: Sequence[EncodedGroup], *, max_tokens_per_pack: int) -> list[int]:
    """Returns which of the groups (prompts with their completions) of an optimizer step this rank (process of the run)
    computes, as indices into `groups`. For the other groups the rank needs no token ids. A forward pass has at most
    `max_tokens_per_pack` tokens, unless a single group is longer."""
    packs = _plan(scorer, groups, max_tokens_per_pack) if groups else []
    return [i for pack in packs for i in pack or _stand_in(scorer)]


def _plan(scorer: Scorer, groups: Sequence[EncodedGroup], max_tokens_per_pack: int) -> Sequence[tuple[int, ...]]:
    return scorer.plan(groups, num_ranks=num_ranks(), max_tokens_per_pack=max_tokens_per_pack)[rank()]


def _stand_in(scorer: Scorer) -> tuple[int, ...]:
    """Returns which group (a prompt with its completions) this rank runs for a pack without groups: a tuple with the
    group's index. The rank drops the result of this run. Returns an empty tuple if the rank need not run such a pack.

    A pack holds the groups that go through one forward pass together. If the model is sharded, all ranks (processes of
    the run) must run the same number of packs, so a rank may have packs without groups.
    """
    return (0,) if is_sharded(scorer.model) else ()


def make_packs(
    scorer: Scorer,
    groups: Sequence[EncodedGroup],
    *,
    max_tokens_per_pack: int,
    seed: int = 0,
    load_ids: LoadIds | None = None,
) -> list[Pack]:
    """Distributes the groups (prompts with their completions) of an optimizer step over ranks (processes) and packs,
    and returns the packs of this rank.

    A pack holds the groups that go through one forward pass together. It has at most `max_tokens_per_pack` tokens,
    unless it has only one group. `seed` decides the dropout of the adapter. If the model is sharded, every rank gets
    the same number of packs, and some may be empty.

    Some groups may be outlines (groups without their token ids). The function `load_ids` takes the outlines among this
    rank's groups, and returns the groups with their ids. It may be None if no group is an outline.
    """
    indices, stand_in = _plan(scorer, groups, max_tokens_per_pack), _stand_in(scorer)
    if load_ids is not None:
        groups = load_groups(groups, own_groups(scorer, groups, max_tokens_per_pack=max_tokens_per_pack), load_ids)
    starts = [0, *accumulate(len(group.completion_ids) for group in groups)]
    packs: list[Pack] = []
    for pack in indices:
        if computed := [groups[i] for i in pack or stand_in]:
            members = computed if pack else []
            places = [place for i in pack for place in range(starts[i], starts[i + 1])]
            pack_seed = zlib.crc32(repr((seed, rank(), len(packs))).encode())
            packs.append(Pack(members, places, scorer.collate(computed), pack_seed))
    return packs


def smaller_packs(scorer: Scorer, groups: Sequence[EncodedGroup], max_tokens_per_pack: int) -> int | None:
    """Returns a smaller value for `max_tokens_per_pack`, the most tokens of a pack: half the tokens of the largest pack
    that any rank (process of the run) has with the present value.

    A pack holds the groups (prompts with their completions) that go through one forward pass together. Returns None if
    packs cannot be smaller, because each has only one group.
    """
    ranks = scorer.plan(groups, num_ranks=num_ranks(), max_tokens_per_pack=max_tokens_per_pack)
    packs = [pack for packs in ranks for pack in packs]
    if max(map(len, packs)) < 2:
        return None
    return max(sum(scorer.count_tokens(groups[i]) for i in pack) for pack in packs) // 2


def goes_by_pack(objective: Objective, scorer: Scorer) -> bool:
    """Whether the gradient of a pack needs only the pack itself. Otherwise it needs the results of the whole global
    batch, and a step of several packs computes the forward pass of each pack twice."""
    return scorer.experts is None and not objective.traits.needs_whole_batch


def backward(
    objective: Objective, scorer: Scorer, groups: Sequence[EncodedGroup], packs: Sequence[Pack], statistics: Statistics
) -> tuple[Measures, Tensor]:
    """Computes the gradient of the loss for the packs of this rank (process of the run), and adds it to the gradients
    of the weights. A pack holds the groups (prompts with their completions) that go through one forward pass together.
    Returns two values: the measures (log-probabilities or rewards) of all completions of all ranks, and the loss of the
    global batch. If training balances experts, the gradient is also that of their load-balancing loss, but the returned
    loss does not contain it.

    Raises MemoryRanOut on all ranks if memory ran out on one rank; gradients and `statistics` are then incomplete.
    """
    run = _backward_by_pack if goes_by_pack(objective, scorer) else _backward_of_whole_batch
    with _dropout(scorer.model):
        return run(objective, scorer, groups, packs, statistics, scorer.table(groups))


@contextmanager
def _dropout(model: nn.Module) -> Iterator[None]:
    """Turns the adapter's dropout on in the `with` block, also for activations that the backward pass recomputes.
    Dropout in the base (the model under the adapter) stays off."""
    layers, device = dropouts(model), next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()


def _measure(scorer: Scorer, pack: Pack) -> Any:
    """Runs the forward pass of a pack, which holds the groups (prompts with their completions) that go through it
    together. Returns the log-probabilities or rewards of the pack's completions, a row for each. Every call with the
    same pack returns the same values, because the pack's seed decides the dropout."""
    torch.manual_seed(pack.seed)
    return scorer(pack.batch)


def _backward_by_pack(
    objective: Objective,
    scorer: Scorer,
    groups: Sequence[EncodedGroup],
    packs: Sequence[Pack],
    statistics: Statistics,
    table: Tensor,
) -> tuple[Measures, Tensor]:
    """Computes the gradient of the loss pack by pack: first the forward, then the backward pass of each pack. A pack
    holds the groups (prompts with their completions) that go through one forward pass together. Works for an objective
    whose loss of a group depends on this group alone.

    Adds the gradient to the gradients of the weights, fills `table` with the measures (log-probabilities or rewards) of
    all completions, and returns these measures and the loss of the global batch. `statistics` has the mean of all
    rewards so far in the run, which some objectives need.
    """

    def compute() -> None:
        for pack in packs:
            measured = _measure(scorer, pack)
            slope = torch.zeros_like(measured)
            if pack.groups:
                table[pack.places] = measured.detach()
                loss_of = partial(share_of_loss, objective, global_batch=groups, statistics=statistics)
                _, slope = _differentiate(loss_of, Measures(pack.groups, measured.detach()))
            measured.backward(slope)

    _guard(scorer, compute)
    all_reduce_sum(table)
    measures = Measures(groups, table)
    return measures, share_of_loss(objective, measures, groups, statistics)


def _backward_of_whole_batch(
    objective: Objective,
    scorer: Scorer,
    groups: Sequence[EncodedGroup],
    packs: Sequence[Pack],
    statistics: Statistics,
    table: Tensor,
) -> tuple[Measures, Tensor]:
    """Computes the gradient of the loss: first the forward passes of all packs, then the backward passes. A pack holds
    the groups (prompts with their completions) that go through one forward pass together. This way works for every
    loss, also if the gradient of one pack depends on other packs:

    - the loss of some objectives compares completions of different packs
    - the loss that balances experts weighs a token's probabilities by how often all tokens of the batch choose each
      expert

    The forward pass of each pack is repeated before its backward pass, unless there is only one pack. Adds the gradient
    to the gradients of the weights, fills `table` with the measures (log-probabilities or rewards) of all completions,
    and returns these measures and the loss of the global batch. `statistics` has the mean of all rewards so far in the
    run, which some objectives need.
    """
    has_one_pack = len(packs) == 1
    first_results = []

    def measure() -> None:
        with torch.set_grad_enabled(has_one_pack):
            for pack in packs:
                measured = _measure(scorer, pack)
                table[pack.places] = measured.detach()[: len(pack.places)]
                first_results.append(measured)

    def differentiate() -> None:
        for pack, first_result in zip(packs, first_results, strict=True):
            measured = first_result if has_one_pack else _measure(scorer, pack)
            slope = torch.zeros_like(measured)
            slope[: len(pack.places)] = slopes[pack.places]
            measured.backward(slope)

    _guard(scorer, measure)
    all_reduce_sum(table)
    measures = Measures(groups, table)
    loss_of = partial(share_of_loss, objective, global_batch=groups, statistics=statistics)
    loss, slopes = _differentiate(loss_of, measures)
    if experts := scorer.experts:
        slopes += experts.coefficient * _differentiate(experts.loss, measures)[1]
    _guard(scorer, differentiate)
    return measures, loss


def _guard(scorer: Scorer, compute: Callable[[], None]) -> None:
    """Calls `compute` on each rank (process of the run). If memory runs out on one rank, raises MemoryRanOut on all
    ranks.

    There is one exception: if the model is sharded, the ranks exchange weights within `compute`, so a rank whose memory
    runs out cannot tell the others. The error of this rank then ends the run.
    """
    if is_sharded(scorer.model):
        compute()
    else:
        within_memory(compute, scorer.model.device)


def _differentiate(loss_of: Callable[[Measures], Tensor], measures: Measures) -> tuple[Tensor, Tensor]:
    """Returns two values: the loss that `loss_of` computes from `measures`, and its gradient with respect to the
    measures (log-probabilities or rewards) of all completions."""
    leaf = measures.table.clone().requires_grad_()
    loss = loss_of(Measures(measures.groups, leaf))
    (slope,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), slope


def share_of_loss(
    objective: Objective, measures: Measures, global_batch: Sequence[EncodedGroup], statistics: Statistics
) -> Tensor:
    """Returns what the groups in `measures` contribute to the loss of the global batch. This is the sum of their
    weighted losses, divided by the number of groups (or, for `supervised`, of tokens) in the batch. A group is a prompt
    with its completions. `statistics` has the mean of all rewards so far in the run, which some objectives need."""
    loss_per_group = losses(objective, measures, statistics) * measures.weights
    return loss_per_group.sum() / denominator(objective, global_batch)


def check_agreement(groups: Sequence[EncodedGroup], what: str, device: torch.device) -> None:
    """Raises RuntimeError if the ranks (processes of the run) were given different groups (prompts with their
    completions). Without this check, the ranks would wait for each other forever. `what` is the word for the groups in
    the error, such as "groups to evaluate on"."""
    if num_ranks() > 1:
        extremes = torch.tensor([_fingerprint(groups), -_fingerprint(groups)], device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        if extremes.sum().item():  # the largest and the smallest fingerprint differ
            raise RuntimeError(
                f"The ranks (training processes) were given different {what}; give every rank the same groups."
            )


def _fingerprint(groups: Sequence[EncodedGroup]) -> int:
    return zlib.crc32(repr([(group.line, group.num_tokens) for group in groups]).encode())

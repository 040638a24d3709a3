"""From the groups of a step to the gradient of their loss, pack by pack."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.adapter import dropouts
from dpo_core.models.architecture import is_sharded
from dpo_core.objectives.losses import Statistics, count_units, losses
from dpo_core.options import Objective
from dpo_core.policy.batch import Batch
from dpo_core.policy.scorer import Scorer
from dpo_core.policy.scores import NUM_MEASURES, Scores
from dpo_core.training.ranks import add_up, num_ranks, rank


@dataclass(frozen=True)
class Pack:
    """Some of a step's groups. An empty one computes a group of another pack, for nothing but company."""

    groups: Sequence[EncodedGroup]
    places: list[int]  # its completions among those of the step
    batch: Batch
    seed: int  # of what an adapter's dropout leaves out


def make_packs(
    scorer: Scorer, groups: Sequence[EncodedGroup], *, max_tokens_per_pack: int, seed: int = 0
) -> list[Pack]:
    """This rank's packs; as many as on every other rank, where a forward is a joint work of all."""
    everywhere = is_sharded(scorer.model)
    indices = scorer.plan(groups, num_ranks=num_ranks(), max_tokens_per_pack=max_tokens_per_pack)[rank()]
    starts = [0, *accumulate(len(group.completion_ids) for group in groups)]
    packs: list[Pack] = []
    for pack in indices:
        if pack or everywhere:
            own = [groups[i] for i in pack]
            places = [place for i in pack for place in range(starts[i], starts[i + 1])]
            own_seed = zlib.crc32(repr((seed, rank(), len(packs))).encode())
            packs.append(Pack(own, places, scorer.collate(own or groups[:1]), own_seed))
    return packs


def backward(
    objective: Objective, scorer: Scorer, groups: Sequence[EncodedGroup], packs: Sequence[Pack], statistics: Statistics
) -> tuple[Scores, Tensor]:
    """Add this rank's share to the gradients. Returns what the policy says of all completions, and their loss."""
    with _dropout(scorer.model):
        return _backward(objective, scorer, groups, packs, statistics)


@contextmanager
def _dropout(model: nn.Module) -> Iterator[None]:
    """Within, an adapter's dropout is on, also where activations are computed again; that of the base stays off."""
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
    """The same numbers in every call."""
    torch.manual_seed(pack.seed)
    return scorer(pack.batch)


def _backward(
    objective: Objective, scorer: Scorer, groups: Sequence[EncodedGroup], packs: Sequence[Pack], statistics: Statistics
) -> tuple[Scores, Tensor]:
    found = torch.zeros(sum(len(g.completion_ids) for g in groups), NUM_MEASURES, device=scorer.model.device)
    if objective.traits.needs_whole_batch:
        return _backward_of_whole_batch(objective, scorer, groups, packs, statistics, found)
    for pack in packs:
        measured = _measure(scorer, pack)
        slope = torch.zeros_like(measured)
        if pack.groups:
            found[pack.places] = measured.detach()
            _, slope = _differentiate(objective, Scores(pack.groups, measured.detach()), groups, statistics)
        measured.backward(slope)
    add_up(found)
    scores = Scores(groups, found)
    return scores, share_of_loss(objective, scores, groups, statistics)


def _backward_of_whole_batch(
    objective: Objective,
    scorer: Scorer,
    groups: Sequence[EncodedGroup],
    packs: Sequence[Pack],
    statistics: Statistics,
    found: Tensor,
) -> tuple[Scores, Tensor]:
    """The loss joins completions of all packs: find all of them first. A single pack is not computed again."""
    once = len(packs) == 1
    kept = []
    with torch.set_grad_enabled(once):
        for pack in packs:
            measured = _measure(scorer, pack)
            found[pack.places] = measured.detach()[: len(pack.places)]
            kept.append(measured)
    add_up(found)
    scores = Scores(groups, found)
    loss, slopes = _differentiate(objective, scores, groups, statistics)
    for pack, before in zip(packs, kept, strict=True):
        measured = before if once else _measure(scorer, pack)
        slope = torch.zeros_like(measured)
        slope[: len(pack.places)] = slopes[pack.places]
        measured.backward(slope)
    return scores, loss


def _differentiate(
    objective: Objective, scores: Scores, global_batch: Sequence[EncodedGroup], statistics: Statistics
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by what was found."""
    leaf = scores.found.clone().requires_grad_()
    loss = share_of_loss(objective, Scores(scores.groups, leaf), global_batch, statistics)
    (slope,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), slope


def share_of_loss(
    objective: Objective, scores: Scores, global_batch: Sequence[EncodedGroup], statistics: Statistics
) -> Tensor:
    """The share of these groups in the loss of the global batch."""
    found = losses(objective, scores, statistics) * scores.weights
    return found.sum() / count_units(objective, global_batch)


def check_agreement(groups: Sequence[EncodedGroup], what: str, device: torch.device) -> None:
    """Raises RuntimeError where ranks were given different groups, before they wait for each other for ever."""
    if num_ranks() > 1:
        own = torch.tensor([_fingerprint(groups), -_fingerprint(groups)], device=device)
        dist.all_reduce(own, dist.ReduceOp.MAX)
        if own.sum().item():
            raise RuntimeError(f"Ranks were given different {what}; give each the same groups.")


def _fingerprint(groups: Sequence[EncodedGroup]) -> int:
    return zlib.crc32(repr([(group.line, group.num_tokens) for group in groups]).encode())

"""What the policy makes of groups that it is not trained on."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.objectives.losses import Statistics, check_groups
from dpo_core.objectives.metrics import measure
from dpo_core.options import Objective
from dpo_core.policy.scorer import Scorer
from dpo_core.policy.scores import NUM_MEASURES, Scores
from dpo_core.training.gradients import check_agreement, make_packs, share_of_loss
from dpo_core.training.ranks import add_up

Batches = Iterable[Sequence[EncodedGroup]]


@torch.no_grad()
def evaluate(
    objective: Objective, scorer: Scorer, batches: Batches, statistics: Statistics, *, max_tokens_per_pack: int
) -> dict[str, float]:
    """Loss and metrics as of a step whose global batch is all these groups, by training's names behind `eval/`.

    So they do not depend on how the groups are cut into batches and packs and dealt to ranks, and whatever an
    objective joins over a global batch, it joins here over all groups. `statistics` are read only.
    """
    seen: list[EncodedGroup] = []
    parts: list[Tensor] = []
    for groups in batches:
        check_groups(objective, groups)
        check_agreement(groups, "groups to evaluate on", scorer.model.device)
        found = torch.zeros(sum(len(g.completion_ids) for g in groups), NUM_MEASURES, device=scorer.model.device)
        for pack in make_packs(scorer, groups, max_tokens_per_pack=max_tokens_per_pack):
            found[pack.places] = scorer(pack.batch)[: len(pack.places)]
        if isinstance(scorer, FSDPModule):
            scorer.reshard()  # as a backward does, of which there is none
        seen += map(_outline, groups)
        parts.append(found)
    if not seen:
        raise ValueError("No groups came to evaluate on; give validation some, or leave it out.")
    found = torch.cat(parts)
    add_up(found)
    scores = Scores(seen, found.cpu())  # of rankings many, the device may not hold what is compared
    loss = share_of_loss(objective, scores, seen, _Frozen(**vars(statistics)))
    return {f"eval/{key}": value.item() for key, value in {"loss": loss, **measure(objective, scores)}.items()}


class _Frozen(Statistics):
    def add(self, rewards: Tensor) -> float:
        return self.mean


def _outline(group: EncodedGroup) -> EncodedGroup:
    """From here on ids only count, and there may be many."""
    completions = tuple(range(len(ids)) for ids in group.completion_ids)
    return replace(group, prompt_ids=range(len(group.prompt_ids)), completion_ids=completions)

"""Computes the policy's loss and metrics on held-out groups. A group is a prompt with its completions. The policy is
not trained on held-out groups."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dpo_core.encoding.encode import EncodedGroup, Outline
from dpo_core.objectives.losses import Statistics, check_groups
from dpo_core.objectives.metrics import compute_metrics
from dpo_core.options import Objective
from dpo_core.policy.measures import Measures
from dpo_core.policy.routing import balance_metrics
from dpo_core.policy.scorer import Scorer
from dpo_core.training.gradients import check_agreement, make_packs, share_of_loss
from dpo_core.training.load_ahead import LoadIds
from dpo_core.training.ranks import all_reduce_sum

Batches = Iterable[Sequence[EncodedGroup]]


@torch.no_grad()
def evaluate(
    objective: Objective,
    scorer: Scorer,
    batches: Batches,
    statistics: Statistics,
    *,
    max_tokens_per_pack: int,
    load_ids: LoadIds | None = None,
) -> dict[str, float]:
    """Returns the loss and metrics of all groups (prompts with their completions) in `batches`, as if they were one
    global batch. The names of the metrics begin with `eval/`. Raises ValueError if there are no groups.

    `statistics` has the mean of all rewards so far in the run, which is read and not changed. Some groups may be
    outlines (groups without their token ids). `load_ids` returns, for a list of outlines, the groups with their ids.
    `load_ids` may be None if no group is an outline.

    A pack holds the groups that go through one forward pass together, with at most `max_tokens_per_pack` tokens. The
    results do not depend on how the groups are cut into batches and packs, or distributed over ranks (processes). If
    the loss of an objective compares groups of a global batch, all groups are compared.
    """
    seen: list[EncodedGroup] = []
    tables: list[Tensor] = []
    for groups in batches:
        check_groups(objective, groups)
        check_agreement(groups, "groups to evaluate on", scorer.model.device)
        table = scorer.table(groups)
        for pack in make_packs(scorer, groups, max_tokens_per_pack=max_tokens_per_pack, load_ids=load_ids):
            table[pack.places] = scorer(pack.batch)[: len(pack.places)]
        if isinstance(scorer, FSDPModule):
            scorer.reshard()  # in training the backward pass does this
        seen += map(Outline.of, groups)  # of many groups, only the numbers of their tokens are needed
        tables.append(table)
    if not seen:
        raise ValueError("The validation data have no rows to evaluate on; add some, or leave the validation data out.")
    table = torch.cat(tables)
    all_reduce_sum(table)
    measures = Measures(seen, table.cpu())  # comparing many large rankings may need more memory than a GPU has
    loss = share_of_loss(objective, measures, seen, _Frozen(**vars(statistics)))
    metrics = {"loss": loss, **compute_metrics(objective, measures), **balance_metrics(scorer.experts, measures)}
    return {f"eval/{key}": value.item() for key, value in metrics.items()}


class _Frozen(Statistics):
    """Statistics (the mean of all rewards so far in a run) for an evaluation. `add` leaves the mean unchanged, because
    held-out groups (prompts with their completions) must not affect training."""

    def add(self, rewards: Tensor) -> float:
        return self.mean

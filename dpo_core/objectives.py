"""One function per objective, and the table that names them.

A function gives one loss per unit, a token or a group. The loss of a step is their mean over the
units of the global batch, however it was cut into packs and dealt to ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_core import config
from dpo_core.batch import Batch
from dpo_core.encode import EncodedGroup
from dpo_core.logps import sum_by_completion


@dataclass(frozen=True)
class Definition:
    """What the trainer must know of an objective."""

    losses: Callable[[Any, Batch, Tensor], Tensor]  # (its config, batch, token_logps [R]) -> one loss per unit
    count_units: Callable[[Sequence[EncodedGroup]], int]
    num_completions: int  # that every group must have


def supervised(objective: config.Supervised, batch: Batch, token_logps: Tensor) -> Tensor:
    """-log pi(token), for every completion token."""
    return -token_logps


def dpo(objective: config.Dpo, batch: Batch, token_logps: Tensor) -> Tensor:
    """-log sigmoid(beta (h_w - h_l)) for every pair, h = log pi(y|x) - log pi_ref(y|x); arXiv 2305.18290, eq. 7."""
    assert batch.ref_logps is not None
    logratios = sum_by_completion(token_logps, batch.completion_of_row, batch.num_completions) - batch.ref_logps
    chosen_logratios, rejected_logratios = logratios[batch.group_starts], logratios[batch.group_starts + 1]
    return -logsigmoid(objective.beta * (chosen_logratios - rejected_logratios))


def _count_completion_tokens(groups: Sequence[EncodedGroup]) -> int:
    return sum(len(ids) for group in groups for ids in group.completion_ids)


OBJECTIVES = {
    "supervised": Definition(supervised, _count_completion_tokens, num_completions=1),
    "dpo": Definition(dpo, len, num_completions=2),
}


def check_groups(objective: config.Objective, groups: Sequence[EncodedGroup]) -> None:
    """Raises ValueError for the first group that the objective cannot learn from."""
    definition = OBJECTIVES[objective.type]
    for group in groups:
        if len(group.completion_ids) != definition.num_completions:
            raise ValueError(
                f"Line {group.line} has {len(group.completion_ids)} completions; "
                f"{objective.type} takes {definition.num_completions}."
            )
        if objective.needs_reference and group.ref_logps is None:
            raise ValueError(f"Line {group.line} has no ref_logps; score it with the reference before training.")

"""Holds the numbers that a model gives the completions of some groups: log-probabilities, or rewards of a reward model.
Objectives and metrics are computed from these numbers. A group is a prompt with its completions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from dpo_core.encoding.encode import EncodedGroup

# The columns of a table of measures: those of a policy, or the outputs of a reward model's head.
LOGPS, HEAD_LOGPS, NUM_CORRECT = range(3)
REWARD, LOG_VARIANCE = range(2)
NUM_MEASURES = 3


@dataclass(frozen=True)
class Completions:
    """The log-probabilities (in nats) and lengths (in tokens) of n completions: `logps` under the policy and
    `ref_logps` under the reference. The n completions may be, for example, the best completion of each group (a prompt
    with its completions)."""

    logps: Tensor  # [n] summed over the completion, in nats
    head_logps: Tensor  # [n] summed over as many first tokens as the group's shortest completion has
    lengths: Tensor  # [n] numbers of learned tokens
    ref_logps: Tensor | None  # [n]
    ref_head_logps: Tensor | None  # [n]

    @property
    def logratios(self) -> Tensor:
        assert self.ref_logps is not None  # `check_groups` refuses groups without ref_logps
        return self.logps - self.ref_logps

    @property
    def mean_logratios(self) -> Tensor:
        return self.logratios / self.lengths

    @property
    def mean_logps(self) -> Tensor:
        return self.logps / self.lengths

    def __getitem__(self, which: Tensor) -> "Completions":
        ref = None if self.ref_logps is None else self.ref_logps[which]
        ref_head = None if self.ref_head_logps is None else self.ref_head_logps[which]
        return Completions(self.logps[which], self.head_logps[which], self.lengths[which], ref, ref_head)


class Measures:
    """The log-probabilities or rewards that a model gives the K completions of G groups (prompts with their
    completions). The completions are listed group by group, the best first.

    `table` is [K, NUM_MEASURES]: a row for each completion. The columns are LOGPS, HEAD_LOGPS and NUM_CORRECT for a
    policy, and REWARD and LOG_VARIANCE for a reward model. If training balances the N experts of a mixture, 2N more
    columns follow; the property `spread` explains them.
    """

    def __init__(self, groups: Sequence[EncodedGroup], table: Tensor) -> None:
        self.groups = groups
        self.table = table
        self.sizes = [len(group.completion_ids) for group in groups]

    @cached_property
    def all(self) -> Completions:
        """The log-probabilities and lengths of all completions, whatever their group and rating."""
        logps, head_logps = self.table[:, LOGPS], self.table[:, HEAD_LOGPS]
        lengths = self._tensor([length for group in self.groups for length in group.num_learned])
        return Completions(logps, head_logps, lengths, self._of_groups("ref_logps"), self._of_groups("ref_head_logps"))

    @cached_property
    def starts(self) -> Tensor:
        """The number of the row in `table` that holds the best completion of each of G groups (prompts with their
        completions), [G]. It is the group's first row."""
        return self.places([0, *accumulate(self.sizes[:-1])])

    @cached_property
    def chosen(self) -> Completions:
        """The log-probabilities and lengths of the best completion of each group (a prompt with its completions)."""
        return self.all[self.starts]

    @cached_property
    def rejected(self) -> Completions:
        """The log-probabilities and lengths of the second completion of each group (a prompt with its completions).
        Every group must have exactly two completions."""
        return self.all[self.starts + 1]

    @cached_property
    def ratings(self) -> Tensor:
        """The rating of each of K completions, [K]. A higher rating is better. The rating nan marks a completion that
        answers the prompt of another group; KTO needs such completions."""
        return self._tensor([rating for group in self.groups for rating in group.ranked()])

    @cached_property
    def worse(self) -> Tensor:
        """For G groups (prompts with their completions), a boolean tensor [G, k, k], where k is the number of
        completions in the largest group. Entry [g, i, j] says whether completion j of group g is rated lower than
        completion i."""
        ratings = self.by_group(self.ratings, math.nan)
        return ratings[:, :, None] > ratings[:, None, :]

    @cached_property
    def margins(self) -> Tensor:
        """The margin of each of G groups (prompts with their completions), [G]: by how much the reward of the chosen
        completion should exceed that of the rejected one. 0 for a group without a margin."""
        return self._tensor([group.margin or 0.0 for group in self.groups])

    @cached_property
    def weights(self) -> Tensor:
        """The weight of each of G groups in the loss, [G]. A group is a prompt with its completions."""
        return self._tensor([group.weight for group in self.groups])

    @property
    def rewards(self) -> Tensor:
        """The reward that a reward model gives each of K completions, [K]. If the model gives a mean and a variance,
        the reward is the mean."""
        return self.table[:, REWARD]

    @property
    def log_variances(self) -> Tensor:
        """The logarithm of the variance of the reward of each of K completions, [K]. Only a reward model with two
        outputs gives it."""
        return self.table[:, LOG_VARIANCE]

    @cached_property
    def num_correct(self) -> Tensor:
        """For each of K completions, [K], the number of its tokens that the policy found the likeliest of all
        tokens."""
        return self.table[:, NUM_CORRECT]

    @property
    def spread(self) -> Tensor:
        """How routers spread the tokens of each completion and its prompt over N experts, [K, 2N] for K completions:
        for each expert, how often the routers chose it, then for each expert, the sum of its probabilities. All these
        numbers are 0 for a completion that answers the prompt of another group; KTO needs such completions."""
        return self.table[:, NUM_MEASURES:] * ~self.ratings.isnan()[:, None]

    def by_group(self, values: Tensor, fill: float) -> Tensor:
        """Returns `values`, one for each completion, as a matrix with a row for each group (a prompt with its
        completions), [G, k]. k is the size of the largest group; the rows of smaller groups end with `fill`."""
        num_groups, most = len(self.sizes), max(self.sizes)
        if len(values) == num_groups * most:
            return values.view(num_groups, most)
        padded = values.new_full((num_groups * most,), fill)
        return padded.index_copy(0, self._places_by_group, values).view(num_groups, most)

    def group_sums(self, values: Tensor) -> Tensor:
        """Returns for each of G groups (prompts with their completions) the sum of `values` over its completions, [G].
        `values` has one value for each completion."""
        return self.by_group(values, 0.0).sum(1)

    def places(self, places: Sequence[int]) -> Tensor:
        """Turns `places`, a list of row numbers of `table`, into an index tensor on the device of `table`."""
        return torch.tensor(places).to(self.table.device, non_blocking=True)

    @cached_property
    def _places_by_group(self) -> Tensor:
        """For each of K completions, its index in a flat list of all groups (prompts with their completions), [K]. In
        this list every group has the same number of entries, as many as the largest group has completions; smaller
        groups leave entries unused."""
        most = max(self.sizes)
        return self.places([row * most + i for row, size in enumerate(self.sizes) for i in range(size)])

    def _of_groups(self, name: str) -> Tensor | None:
        """Returns a tensor [K] with the attribute `name` of all groups (prompts with their completions), such as
        `ref_logps`: a number for each of K completions. Returns None if a group lacks this attribute."""
        values = [getattr(group, name) for group in self.groups]
        return None if None in values else self._tensor([number for numbers in values for number in numbers])

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=self.table.dtype).to(self.table.device, non_blocking=True)

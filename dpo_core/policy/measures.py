"""What policy and reference say of the completions of some groups: what objectives and metrics read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from dpo_core.encoding.encode import EncodedGroup

# Columns of what a model finds: a policy's logps, head_logps, num_correct; or the outputs of a reward model's head.
NUM_MEASURES = 3


@dataclass(frozen=True)
class Completions:
    """One completion of each group, or any n of them."""

    logps: Tensor  # [n] summed over the completion, in nats
    head_logps: Tensor  # [n] summed over no more tokens than the group's shortest completion has
    lengths: Tensor  # [n] tokens that are learned
    ref_logps: Tensor | None  # [n]
    ref_head_logps: Tensor | None  # [n]

    @property
    def logratios(self) -> Tensor:
        assert self.ref_logps is not None  # `check_groups` has seen it
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


class Scores:
    """G groups whose K completions stand end to end, the best of each group first.

    `found` is [K, NUM_MEASURES].
    """

    def __init__(self, groups: Sequence[EncodedGroup], found: Tensor) -> None:
        self.groups = groups
        self.found = found
        self.sizes = [len(group.completion_ids) for group in groups]

    @cached_property
    def all(self) -> Completions:
        logps, head_logps = self.found[:, 0], self.found[:, 1]
        lengths = self._of_completions([length for group in self.groups for length in group.num_learned])
        return Completions(logps, head_logps, lengths, self._known("ref_logps"), self._known("ref_head_logps"))

    @cached_property
    def starts(self) -> Tensor:
        """[G] the best completion of each group."""
        return self.places([0, *accumulate(self.sizes[:-1])])

    @cached_property
    def chosen(self) -> Completions:
        return self.all[self.starts]

    @cached_property
    def rejected(self) -> Completions:
        """Of pairs."""
        return self.all[self.starts + 1]

    @cached_property
    def ratings(self) -> Tensor:
        """[K] higher is better; nan for a completion of another prompt."""
        return self._of_completions([rating for group in self.groups for rating in group.ranked()])

    @cached_property
    def worse(self) -> Tensor:
        """[G, k, k] whether completion j is rated lower than completion i."""
        ratings = self.by_group(self.ratings, math.nan)
        return ratings[:, :, None] > ratings[:, None, :]

    @cached_property
    def margins(self) -> Tensor:
        """[G] by how much the chosen completion must lead; 0 where nobody said."""
        return self._of_completions([group.margin or 0.0 for group in self.groups])

    @cached_property
    def weights(self) -> Tensor:
        """[G] of each group's loss."""
        return self._of_completions([group.weight for group in self.groups])

    @property
    def rewards(self) -> Tensor:
        """[K] of a reward model; the mean, where it gives a variance too."""
        return self.found[:, 0]

    @property
    def log_variances(self) -> Tensor:
        """[K] of a reward model with two outputs."""
        return self.found[:, 1]

    @cached_property
    def num_correct(self) -> Tensor:
        """[K] tokens that were the policy's likeliest."""
        return self.found[:, 2]

    def by_group(self, values: Tensor, fill: float) -> Tensor:
        """[K] to [G, most completions], padded with `fill`."""
        num_groups, most = len(self.sizes), max(self.sizes)
        if len(values) == num_groups * most:
            return values.view(num_groups, most)
        padded = values.new_full((num_groups * most,), fill)
        return padded.index_copy(0, self._places_by_group, values).view(num_groups, most)

    def group_sums(self, values: Tensor) -> Tensor:
        """[K] to [G] sums."""
        return self.by_group(values, 0.0).sum(1)

    def places(self, places: Sequence[int]) -> Tensor:
        """An index of completions, on the device that has them."""
        return torch.tensor(places).to(self.found.device, non_blocking=True)

    @cached_property
    def _places_by_group(self) -> Tensor:
        """[K] where each completion stands once all groups are padded to the size of the largest."""
        most = max(self.sizes)
        return self.places([row * most + i for row, size in enumerate(self.sizes) for i in range(size)])

    def _known(self, name: str) -> Tensor | None:
        values = [getattr(group, name) for group in self.groups]
        return None if None in values else self._of_completions([value for each in values for value in each])

    def _of_completions(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=self.found.dtype).to(self.found.device, non_blocking=True)

"""Says what all kinds of evaluations have in common."""

from collections.abc import Sequence
from typing import Any, Protocol

from dpo_core.data.groups import Group
from services.control_plane.evaluations.kinds.asking import Models

Found = dict[str, Any]


class Kind(Protocol):
    """A kind of evaluation, with the models of one evaluation.

    All items pass through the first stage before any passes through the second. So each stage should need one model
    only, because not all models may fit into the cluster at the same time.
    """

    @property
    def num_stages(self) -> int: ...

    @property
    def resolved(self) -> dict[str, Any]:
        """Returns the fields of the request that the service has chosen, because the request left them out."""

    async def work(self, stage: int, number: int, group: Group, found: Found, models: Models) -> Found:
        """Does one stage of an item, and returns what it found, to be added to `found`, what earlier stages found."""

    def summarize(self, items: Sequence[Found]) -> dict[str, Any]:
        """Returns the results of the evaluation, from what was found about its items, of which there is at least
        one."""

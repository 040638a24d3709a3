"""Defines the methods of every kind of evaluation. These methods do the stages of an item (such as answering and
judging a prompt), and summarize the results of all items."""

from collections.abc import Sequence
from typing import Any, Protocol

from dpo_core.data.groups import Group
from services.control_plane.evaluations.kinds.asking import Models

Found = dict[str, Any]


class Kind(Protocol):
    """What every kind of evaluation offers, such as `Compare`. An object holds the models of one evaluation.

    All items (prompts) pass through the first stage, such as answering, before any item passes through the second. Each
    stage should need one model only, because not all models may fit into the cluster at the same time.
    """

    @property
    def num_stages(self) -> int: ...

    @property
    def resolved(self) -> dict[str, Any]:
        """Returns the fields that the request for the evaluation left out, with the values that the service chose for
        them.
        """

    async def work(self, stage: int, number: int, group: Group, found: Found, models: Models) -> Found:
        """Does one stage (such as answering or judging) of an item (a prompt of the evaluation). Returns the results.

        `number` is the number of the item, `group` its prompt and completions, and `found` the results of its earlier
        stages. `models` sends requests to models.
        """

    def summarize(self, items: Sequence[Found]) -> dict[str, Any]:
        """Returns the results of the evaluation. `items` are the results of its items (prompts), at least one."""

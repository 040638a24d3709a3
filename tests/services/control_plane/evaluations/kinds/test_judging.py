"""Tests how verdicts in both orders become one, with a stand-in for the models."""

import asyncio
from typing import Any

import pytest

from dpo_core.data.groups import Group
from services.control_plane.core.errors import NotFound
from services.control_plane.evaluations.kinds.judging import Grader, agreed, together
from services.control_plane.evaluations.requests import Judge
from services.control_plane.models.models import STARTED_AT, NamedModel

GROUP = Group("Why?", ("Because.",), 1)


class Asked:
    """Answers for the judge: gives the letters one after the other."""

    def __init__(self, *letters: str) -> None:
        self.letters, self.questions = list(letters), list[str]()

    async def choose(self, model: NamedModel, question: str, choices: tuple[str, ...]) -> str:
        assert choices == ("A", "B", "C")
        self.questions.append(question)
        return self.letters.pop(0)


@pytest.mark.parametrize(
    ("letters", "verdicts", "outcome"),
    [
        ("AB", ["first", "first"], "first"),
        ("BA", ["second", "second"], "second"),
        ("AA", ["first", "second"], "neither"),
        ("BB", ["second", "first"], "neither"),
        ("CC", ["neither", "neither"], "neither"),
        ("AC", ["first", "neither"], "neither"),
    ],
)
def test_orders_that_disagree_are_a_tie(letters: str, verdicts: list[str], outcome: str) -> None:
    asked: Any = Asked(*letters)
    grader = Grader(Judge(type="model", model="m"), NamedModel("m", "/m", "m", STARTED_AT))
    found = asyncio.run(grader.compare(asked, GROUP, "{one}", "{two}"))
    assert (found, agreed(found)) == (verdicts, outcome)
    there, back = asked.questions
    assert there.index("{one}") < there.index("{two}")
    assert back.index("{two}") < back.index("{one}")


@pytest.mark.parametrize(("first", "verdict"), [("Because.", "first"), ("So.", "neither")])
def test_a_rule_compares_scores_once(first: str, verdict: str) -> None:
    asked: Any = Asked()
    assert asyncio.run(Grader(Judge(type="exact")).compare(asked, GROUP, first, "No.")) == [verdict]


def test_the_first_error_cancels_what_runs_beside_it_and_is_raised_itself() -> None:
    cancelled = list[int]()

    async def waits(number: int) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(number)
            raise

    async def fails() -> None:
        await asyncio.sleep(0)
        raise NotFound("gone")

    with pytest.raises(NotFound, match="gone"):
        asyncio.run(together([waits(1), fails(), waits(2)]))
    assert sorted(cancelled) == [1, 2]

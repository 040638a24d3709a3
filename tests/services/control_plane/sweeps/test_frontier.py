"""Tests which evaluations a frontier is drawn of, and which points lie on it."""

from typing import Any

import pytest

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.sweeps.frontier import axes, mark

KINDS = {"wins": "compare", "words": "score", "far": "drift", "farther": "drift", "held": "preferences"}


def test_the_first_evaluations_that_fit_are_taken_unless_others_are_named() -> None:
    assert axes(KINDS, None, None) == (("far", "kl_per_sequence"), ("wins", "win_rate"))
    assert axes(KINDS, "farther", "words") == (("farther", "kl_per_sequence"), ("words", "score"))


@pytest.mark.parametrize(
    ("kinds", "kl", "reward", "param"),
    [({"words": "score"}, None, None, "kl"), (KINDS, "words", None, "kl"), (KINDS, None, "nobody", "reward")],
)
def test_an_axis_without_an_evaluation_is_refused(
    kinds: dict[str, str], kl: str | None, reward: str | None, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        axes(kinds, kl, reward)
    assert caught.value.param == param


def test_a_point_is_on_the_frontier_if_none_has_more_reward_for_as_little_kl() -> None:
    def point(kl: float, reward: float) -> dict[str, Any]:
        return {"kl": {"value": kl}, "reward": {"value": reward}}

    found = mark([point(3, 5), point(1, 2), point(1, 1), point(2, 2), point(4, 4), point(0, -1)])
    assert [(each["kl"]["value"], each["reward"]["value"], each["on_frontier"]) for each in found] == [
        (0, -1, True),
        (1, 2, True),
        (1, 1, False),
        (2, 2, False),
        (3, 5, True),
        (4, 4, False),
    ]

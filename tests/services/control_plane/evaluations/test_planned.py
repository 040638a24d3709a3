"""Tests which evaluations of policies that do not exist yet may be named."""

from typing import Any

import pytest

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations import planned

SCORE: dict[str, Any] = {"kind": "score", "judge": {"type": "length"}, "file": "file-1"}
IMPLICIT: dict[str, Any] = {**SCORE, "judge": {"type": "implicit"}}


def test_each_becomes_a_request_for_an_evaluation_of_the_model() -> None:
    found = planned.bodies({"a": SCORE, "b": IMPLICIT}, "tiny", "evaluations")
    assert [(name, body.model) for name, body in found.items()] == [("a", "tiny"), ("b", "tiny")]
    assert [planned.is_own_judge(body) for body in found.values()] == [False, True]
    named = planned.bodies({"a": {**SCORE, "judge": {"type": "implicit", "model": "one"}}}, "tiny", "evaluations")
    assert not planned.is_own_judge(named["a"])


@pytest.mark.parametrize(
    ("body", "param"),
    [(SCORE | {"model": "tiny"}, "a.model"), (SCORE | {"kind": "guess"}, "a.kind"), (SCORE | {"beta": 1}, "a.beta")],
)
def test_a_wrong_field_is_refused_by_its_path(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        planned.bodies({"a": body}, "tiny", "job.evaluations")
    assert caught.value.param == f"job.evaluations.{param}"

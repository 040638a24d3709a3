"""Tests the rows in the body of POST /v1/x/rewards."""

from typing import Any

import pytest
from pydantic import ValidationError

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.rewards.requests import MOST_COMPLETIONS, MOST_ROWS, RewardsBody, groups_of


def body(*rows: dict[str, Any], **more: Any) -> RewardsBody:
    return RewardsBody.model_validate({"model": "ft:1", "rows": list(rows)} | more)


def test_rows_become_groups_in_the_order_of_their_completions() -> None:
    groups = groups_of(
        body({"prompt": "a?", "completions": ["b", "c", "b"]}, {"prompt": "d?", "completions": ["e"], "system": "s"})
    )
    assert (groups[0].prompt, groups[0].completions) == ("a?", ("b", "c", "b"))
    assert groups[1].completions == ([{"role": "assistant", "content": "e"}],)
    assert [message["content"] for message in groups[1].prompt] == ["s", "d?"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("row", "param"),
    [
        ({"prompt": 5, "completions": ["b"]}, "rows.1.prompt"),
        ({"prompt": "a?", "completions": ["b", 5]}, "rows.1.completions.1"),
        ({"prompt": "a?", "completions": "b"}, "rows.1"),
        ({"prompt": "a?", "completions": ["b"] * (MOST_COMPLETIONS + 1)}, "rows.1.completions"),
    ],
)
def test_a_wrong_row_is_refused_by_the_path_of_its_value(row: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        groups_of(body({"prompt": "a?", "completions": ["b"]}, row))
    assert refused.value.param is not None
    assert refused.value.param.startswith(param)


@pytest.mark.parametrize(
    "wrong",
    [{"rows": []}, {"beta": 0}, {"beta": 101}, {"rows": [{"prompt": "", "completions": [""]}] * (MOST_ROWS + 1)}],
)
def test_a_body_beyond_its_limits_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        body({"prompt": "a?", "completions": ["b"]}, **wrong)

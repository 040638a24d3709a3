"""Tests how rows are read from requests, turned into JSON and back, and written as texts."""

from typing import Any

import pytest

from dpo_core.data.groups import Group
from services.control_plane.evaluations import rows
from services.control_plane.evaluations.requests import EvaluationRow

ASKED = [{"role": "user", "content": "Where?"}]
CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"what": "saw"}'}}


@pytest.mark.parametrize(
    ("row", "prompt", "completions"),
    [
        ({"prompt": "Where?"}, "Where?", ()),
        ({"prompt": ASKED}, ASKED, ()),
        ({"prompt": "Where?", "system": "Be short."}, [{"role": "system", "content": "Be short."}, *ASKED], ()),
        ({"prompt": "Where?", "completions": ["Here.", ""]}, "Where?", ("Here.", "")),
        ({"prompt": ASKED, "system": "Be short."}, [{"role": "system", "content": "Be short."}, *ASKED], ()),
    ],
)
def test_a_row_of_a_request_has_a_prompt_and_may_have_completions(
    row: dict[str, Any], prompt: object, completions: tuple[str, ...]
) -> None:
    (group,) = rows.read_request([EvaluationRow(**row)])
    assert (group.prompt, group.completions) == (prompt, completions)


def test_a_row_is_the_same_after_it_was_stored() -> None:
    group = Group(ASKED, ([{"role": "assistant", "content": "Here."}], []), 3, (1.0, 0.0), template_arguments={"a": 1})
    assert rows.group_of(rows.to_json([group])[0]) == group


@pytest.mark.parametrize(
    ("group", "pair"),
    [
        (Group("a", ("b", "c", "d"), 1), ("b", "d")),
        (Group("a", ("b", "c"), 1, (2.0, 1.0)), ("b", "c")),
        (Group("a", ("b", "c"), 1, (1.0, 1.0)), None),
        (Group("a", ("b",), 1), None),
    ],
)
def test_people_prefer_the_first_completion_to_the_last_unless_they_are_rated_equal(
    group: Group, pair: tuple[str, str] | None
) -> None:
    assert rows.labelled(group) == pair


def test_a_judge_reads_roles_contents_and_calls_of_tools() -> None:
    called: Any = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    told = rows.conversation(called)
    assert told == 'user: Where?\n\nassistant: [{"name": "find", "arguments": "{\\"what\\": \\"saw\\"}"}]'
    assert rows.text_of(called) == told.partition("assistant: ")[2]
    assert rows.conversation("as it is") == rows.text_of("as it is") == "as it is"

"""Tests which bodies of feedback are refused, and by which field."""

from typing import Any

import pytest

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.feedback.requests import CreateFeedback, vote_of
from services.control_plane.http.validation import parse
from tests.services.control_plane.feedback.test_api import BAD, CHAT, GOOD, SAID


def body(**given: Any) -> CreateFeedback:
    return parse(CreateFeedback, {"prompt": CHAT, **given}, "")


def refusal(**given: Any) -> tuple[str | None, str]:
    with pytest.raises(InvalidRequest) as refused:
        vote_of(body(**{"completions": [GOOD, BAD]} | given))
    return refused.value.param, refused.value.message


def test_tools_and_arguments_of_the_template_stay_in_the_row() -> None:
    tool = {"type": "function", "function": {"name": "stock", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "stock", "arguments": "{}"}}
    calling = {"completion": [{"role": "assistant", "content": None, "tool_calls": [call]}], "model": "tiny"}
    more = {"tools": [tool], "chat_template_kwargs": {"enable_thinking": False}}
    row = vote_of(body(completions=[calling, BAD], choice=0, **more)).row
    assert {name: row[name] for name in more} == more
    assert row["chosen"] == calling["completion"]


def test_a_request_has_exactly_one_vote_for_the_right_number_of_completions() -> None:
    assert refusal() == (None, "The request has no vote; send exactly one of choice, thumb, ratings, edit.")
    assert refusal(choice=0, ratings=[1, 2])[0] == "ratings"
    assert refusal(thumb="up") == (
        "completions",
        "The request has 2 completions, but the vote 'thumb' needs 1; change the completions.",
    )
    assert refusal(edit="Aisle four.")[0] == "completions"
    assert refusal(completions=[GOOD], choice=0)[0] == "completions"
    assert refusal(ratings=[1])[0] == "ratings"
    assert refusal(choice=2)[0] == "choice"
    assert refusal(thumb="sideways")[0] == "thumb"
    assert refusal(completions=[GOOD] * 17, ratings=[1] * 17)[0] == "completions"


def test_a_wrong_value_is_named_by_its_field_of_the_request() -> None:
    empty = {"completion": "", "model": "tiny"}
    assert refusal(completions=[GOOD, empty], choice=1) == (
        "completions.1.completion",
        "completions.1.completion is an empty completion; write text into the field, or remove the row.",
    )
    robot = {"completion": [{"role": "robot", "content": "Hi"}]}
    assert refusal(completions=[robot, GOOD], ratings=[1, 2])[0] == "completions.0.completion.0.role"
    assert refusal(completions=[GOOD], edit="")[0] == "edit"
    assert refusal(prompt=[], choice=0)[0] == "prompt"
    assert refusal(prompt=[{"role": "user", "content": 7}], choice=0)[0] == "prompt.0.content"
    assert refusal(tools=[7], choice=0)[0] == "tools.0"
    assert refusal(prompt="Hi", completions=[{"completion": SAID["No idea."]}, GOOD], choice=0)[0] == "prompt"
    assert refusal(completions=[GOOD, {"completion": "x" * 2**20}], choice=0)[0] == "completions"
    assert refusal(completions=[GOOD, {"completion": "\0"}], choice=0)[0] == "completions.1.completion"

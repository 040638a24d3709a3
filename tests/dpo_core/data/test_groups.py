"""Tests how readers make groups of the values of a row."""

import pytest

from dpo_core.data.groups import (
    Group,
    answer,
    best_first,
    completion_like,
    items,
    parted,
    question,
    rejected_like,
    text_or_messages,
)
from dpo_core.data.jsonl import InvalidRow, Row

USER = {"role": "user", "content": "a?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in "bc")


def row(**value: object) -> Row:
    return Row(7, value)


def refusal(call) -> tuple[str, str]:
    with pytest.raises(InvalidRow) as refused:
        call()
    assert refused.value.line == 7
    return refused.value.pointer, refused.value.code


def test_the_highest_rating_comes_first_and_equal_ones_keep_their_order():
    group = best_first(row(), "a?", ["x", "y", "z", "v"], [1, 3, 1, 2])
    assert group == Group("a?", ("y", "v", "x", "z"), 7, (3, 2, 1, 1))
    assert refusal(lambda: best_first(row(), "a?", ["x"], [1])) == ("", "too_few_completions")


def test_a_completion_has_the_form_of_its_prompt():
    assert text_or_messages(row(), "/p", "a?") == "a?"
    assert text_or_messages(row(), "/p", [USER]) == [USER]
    assert completion_like(row(), "/c", "b", "a?") == "b"
    assert completion_like(row(), "/c", [GOOD], [USER]) == [GOOD]
    assert refusal(lambda: completion_like(row(), "/c", "b", [USER])) == ("/c", "wrong_type")
    assert refusal(lambda: completion_like(row(), "/c", [GOOD], "a?")) == ("/c", "wrong_type")
    assert refusal(lambda: completion_like(row(), "/c", " ", "a?"))[0] == "/c"
    assert rejected_like(row(), "/c", "", "a?") == ""


@pytest.mark.parametrize("value", ["a?", USER, [USER]])
def test_a_question_is_the_users_text_one_message_or_several(value):
    assert question(row(q=value), "q") == [USER]


@pytest.mark.parametrize("value", ["b", GOOD, [GOOD]])
def test_an_answer_is_the_assistants_text_one_message_or_several(value):
    assert answer(row(), "/c", value) == [GOOD]
    assert answer(row(), "/c", "", may_be_empty=True) == [{"role": "assistant", "content": ""}]
    assert refusal(lambda: answer(row(), "/c", ""))[0] == "/c"


def test_two_conversations_share_the_messages_before_the_first_that_differs():
    prompt, completions = parted(row(), ("x", "y"), ([USER, GOOD, USER, GOOD], [USER, GOOD, USER, BAD]))
    assert (prompt, completions) == ([USER, GOOD, USER], ([GOOD], [BAD]))
    assert parted(row(), ("x", "y"), ([USER, GOOD], [USER, GOOD])) == ([USER], ([GOOD], [GOOD]))
    other = {"role": "user", "content": "d?"}
    assert refusal(lambda: parted(row(), ("x", "y"), ([USER, GOOD], [other, GOOD]))) == ("/y", "different_prompts")
    assert refusal(lambda: parted(row(), ("x", "y"), ([USER, GOOD, GOOD], [USER, GOOD, BAD]))) == (
        "/x/1",
        "invalid_order",
    )


def test_elements_of_a_list_have_the_keys_that_are_asked_for():
    assert list(items(row(a=[{"t": 1, "n": 2}]), "a", "t", "n")) == [{"t": 1, "n": 2}]
    for wrong, pointer in (([], "/a"), ("x", "/a"), ([{"t": 1, "n": 2}, {"t": 1}], "/a/1"), ([5], "/a/0")):
        assert refusal(lambda wrong=wrong: list(items(row(a=wrong), "a", "t", "n"))) == (pointer, "wrong_type")

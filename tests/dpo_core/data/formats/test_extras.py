"""Tests the columns that every format reads (system prompt, template arguments, weight, margin), and unread answers."""

import pytest

from dpo_core.data.formats import extras
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow, Row

ASK, CALL = {"role": "user", "content": "Why?"}, {"role": "system", "content": "Be brief."}


def row(**value: object) -> Row:
    return Row(3, value)


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ({"prompt": "Why?"}, None),
        ({"system": ""}, None),
        ({"system_prompt": "Be brief."}, "Be brief."),
        ({"system": None, "system_prompt": "Be brief."}, "Be brief."),
    ],
)
def test_the_system_prompt_is_that_of_the_column_that_has_text(value, prompt):
    assert extras.system_prompt(row(**value)) == prompt


def test_two_system_prompts_are_refused():
    with pytest.raises(InvalidRow, match=r"/system_prompt and the field /system mean the same; send only one"):
        extras.system_prompt(row(system="a", system_prompt="a"))


def test_a_system_prompt_becomes_the_first_message_once():
    group = Group([ASK], ("a", "b"), 3)
    system = extras.with_system(row(), group, "Be brief.")
    assert system.prompt == [CALL, ASK]
    assert extras.with_system(row(), system, "Be brief.") is system
    with pytest.raises(InvalidRow, match="are two system prompts; send only one"):
        extras.with_system(row(), system, "Be long.")


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (None, None),
        ({}, None),
        ({"enable_thinking": None}, None),
        ({"enable_thinking": False, "effort": None}, {"enable_thinking": False}),
        ('{"effort": "low"}', {"effort": "low"}),
    ],
)
def test_template_arguments_are_an_object_or_its_json_without_nulls(given, arguments):
    assert extras.template_arguments(row(chat_template_kwargs=given)) == arguments


@pytest.mark.parametrize(
    ("given", "pointer", "code"),
    [
        ([1], "/chat_template_kwargs", "wrong_type"),
        ("{", "/chat_template_kwargs", "invalid_json"),
        ({"tools": []}, "/chat_template_kwargs/tools", "unknown_key"),
        ({"a-b": 1}, "/chat_template_kwargs/a-b", "unknown_key"),
        ({"enable_thinking": "False"}, "/chat_template_kwargs/enable_thinking", "wrong_type"),
        ({"effort": float("inf")}, "/chat_template_kwargs", "invalid_number"),
    ],
)
def test_other_template_arguments_are_refused_at_their_place(given, pointer, code):
    with pytest.raises(InvalidRow) as refused:
        extras.template_arguments(row(chat_template_kwargs=given))
    assert (refused.value.line, refused.value.pointer, refused.value.code) == (3, pointer, code)


def test_a_weight_is_above_0_and_a_margin_of_0_is_none():
    assert extras.positive_number(row(weight=0.5), "weight") == 0.5
    assert extras.positive_number(row(), "weight") is None
    assert extras.positive_number(row(margin=0), "margin") is None
    for name, value in (("weight", 0), ("margin", -1)):
        with pytest.raises(InvalidRow, match=f"/{name} is {value}; it must be greater than 0"):
            extras.positive_number(row(**{name: value}), name)


def test_texts_become_messages_of_the_user_and_the_assistant_and_messages_stay():
    groups = [Group("Why?", ("So.",), 3), Group([ASK], ("So.",), 3)]
    texts, messages = extras.as_chat(lambda row: iter(groups))(row())
    assert texts.prompt == [ASK]
    assert texts.completions == ([{"role": "assistant", "content": "So."}],)
    assert messages is groups[1]


def test_answers_that_only_name_unread_columns_are_refused():
    value = {"prompt": "Why?", "chosen": "A", "rejected": "B", "response_a": "Because.", "response_b": "No."}
    unread = {"response_a", "response_b"}
    with pytest.raises(InvalidRow, match="write the answers in place of the names") as refused:
        extras.refuse_named_answers(row(**value), unread, Group("Why?", ("A", "B"), 3))
    assert refused.value.pointer == "/response_a"
    extras.refuse_named_answers(row(**value), unread, Group("Why?", ("Because.", "No."), 3))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("cat", True),
        (["cat", "hat"], True),
        ([{"role": "x", "content": "cat"}], True),
        ("ca", False),
        ("at", False),
        (" ", False),
    ],
)
def test_a_value_is_said_if_a_group_has_all_its_words(value, said):
    assert extras.is_said(value, [Group("a dog", ("no", "x"), 1), Group("the cat", ("hat", "y"), 1)]) is said

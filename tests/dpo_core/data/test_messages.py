"""Tests which messages are read, in the form that chat templates read, and which are refused."""

import json

import pytest
from openai.types.chat import ChatCompletionMessage

from dpo_core.data.feedback import read_groups
from dpo_core.data.jsonl import InvalidRow
from dpo_core.data.survey import survey
from tests.dpo_core.data.formats.test_formats import ASK, PAIR, PROMPT, SYSTEM, TEXTS_OF_ASK, assistant, user
from tests.dpo_core.data.test_feedback import (
    ANSWER,
    CALL,
    CALLS,
    CONVERSATIONS,
    GOOD,
    PREFERENCE,
    USER,
    groups,
    lines,
    refusal,
)


def test_text_parts_are_joined_as_the_server_of_the_policy_joins_them():
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]}
    whole = {"role": "user", "content": "Hi\nyou"}
    assert groups({**PREFERENCE, "input": {"messages": [parts]}}) == groups(
        {**PREFERENCE, "input": {"messages": [whole]}}
    )


def test_a_developer_is_a_system_message_and_names_are_kept():
    messages = [{"role": "developer", "content": "Be kind."}, {**USER, "name": "Ann"}]
    (group,) = groups({**PREFERENCE, "input": {"messages": messages}})
    assert group.prompt == [{"role": "system", "content": "Be kind."}, {**USER, "name": "Ann"}]


def test_the_role_function_is_refused_with_the_role_that_replaced_it():
    row = {**CONVERSATIONS, "prompt": [{**USER, "role": "function"}]}
    with pytest.raises(InvalidRow, match="OpenAI's older form; use the role 'tool' and give the message a tool_call"):
        list(read_groups(lines(row)))


@pytest.mark.parametrize(
    ("messages", "pointer", "code"),
    [
        ([USER, CALLS, {**ANSWER, "tool_call_id": "b"}, GOOD], "/2/tool_call_id", "unknown_tool_call"),
        ([USER, CALLS, {**ANSWER, "tool_call_id": None}, GOOD], "/2/tool_call_id", "unknown_tool_call"),
        ([USER, CALLS, {**ANSWER, "name": "hear"}, GOOD], "/2/tool_call_id", "unknown_tool_call"),
        ([USER, CALLS, {**ANSWER, "tool_call_id": 3}, GOOD], "/2/tool_call_id", "wrong_type"),
        ([USER, CALLS, {**ANSWER, "content": None}, GOOD], "/2/content", "wrong_type"),
        ([USER, CALLS, ANSWER, ANSWER, GOOD], "/3/tool_call_id", "unknown_tool_call"),
        ([USER, CALLS, ANSWER, GOOD, ANSWER, GOOD], "/4/tool_call_id", "unknown_tool_call"),
        ([USER, ANSWER, CALLS, GOOD], "/1/tool_call_id", "unknown_tool_call"),
        ([USER, CALLS, USER, ANSWER, GOOD], "/2", "invalid_order"),
        ([USER, CALLS, GOOD], "/2", "invalid_order"),
        ([USER, {**CALLS, "tool_calls": [CALL, {**CALL, "id": "b"}]}, ANSWER, GOOD], "/3", "invalid_order"),
        ([USER, {**CALLS, "tool_calls": []}], "/1/content", "wrong_type"),
    ],
)
def test_a_conversation_of_calls_without_their_answers_is_refused_by_pointer(messages, pointer, code):
    found = refusal(*lines({"messages": messages}))
    assert (found.pointer, found.code) == (f"/messages{pointer}", code)


def test_a_prompt_ends_only_when_all_its_calls_are_answered():
    both = {**CALLS, "tool_calls": [CALL, {**CALL, "id": "b"}]}
    found = refusal(*lines({**CONVERSATIONS, "prompt": [USER, both, ANSWER]}))
    assert (found.pointer, found.code) == ("/prompt/2", "invalid_order")
    assert "before the tool 'look' has answered its call" in str(found)


def test_a_completion_may_hold_several_messages():
    row = {**PREFERENCE, "input": {"messages": [USER]}, "preferred_output": [CALLS, ANSWER, GOOD]}
    (group,) = read_groups(lines(row))
    assert [message["role"] for message in group.completions[0]] == ["assistant", "tool", "assistant"]
    assert group.completions[0][1]["content"] == ANSWER["content"]


@pytest.mark.parametrize(
    ("completion", "pointer", "code"),
    [([ANSWER], "/0", "invalid_completion"), ([CALLS, GOOD], "/1", "invalid_order")],
)
def test_calls_in_a_completion_are_answered_within_it(completion, pointer, code):
    found = refusal(*lines({**PREFERENCE, "input": {"messages": [USER]}, "preferred_output": completion}))
    assert (found.pointer, found.code) == (f"/preferred_output{pointer}", code)


def test_messages_may_be_from_somebody_and_think():
    row = {
        "messages": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "2 + 2?"},
            {"role": "assistant", "content": "4", "thinking": "Two and two.", "refusal": None, "annotations": []},
        ]
    }
    (group,) = read_groups(lines(row))
    assert group.prompt == [SYSTEM, user("2 + 2?")]
    assert group.completions == ([{**assistant("4"), "reasoning_content": "Two and two."}],)


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content"])
def test_an_answer_may_be_as_a_client_dumps_it(key):
    dumped = ChatCompletionMessage(role="assistant", content="4").model_dump()
    bad = ChatCompletionMessage(role="assistant", content="5").model_dump()
    row = {
        "input": {"messages": [user("2 + 2?")]},
        "preferred_output": [{**dumped, key: "Two and two."}],
        "non_preferred_output": [{**bad, key: None}],
    }
    (group,) = read_groups(lines(row))
    assert group.completions == ([{**assistant("4"), "reasoning_content": "Two and two."}], [assistant("5")])


@pytest.mark.parametrize("column", ["prompt", "chosen"])
@pytest.mark.parametrize(
    "text", [str(PROMPT), str(PAIR[0][0]), json.dumps(PROMPT)[:-2], "[{'content': 'x'}\n {'role': 1}]"]
)
def test_texts_of_messages_that_are_no_json_are_refused(column, text):
    (problem,) = survey(lines({**TEXTS_OF_ASK, column: text})).problems
    assert (problem.code, problem.pointer) == ("invalid_json", f"/{column}")


def test_a_text_part_that_holds_more_than_a_text_is_refused():
    part = {"type": "text", "text": ASK, "image": None}
    row = {"messages": [{"role": "user", "content": [part]}, *PAIR[0]]}
    assert survey(lines(row)).refusal is None
    part["image"] = "cat.png"
    assert survey(lines(row)).problems[0].pointer == "/messages/0/content/0/image"

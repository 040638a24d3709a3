"""Tests which tools and which calls of tools are read, and which are refused."""

import json
import math

import pytest

from dpo_core.data.feedback import read_groups
from dpo_core.data.jsonl import InvalidRow
from dpo_core.data.survey import survey
from tests.dpo_core.data.formats.test_formats import (
    LIGHT,
    OPENAI_CHAT,
    PARIS,
    TRL,
    TRL_IMPLICIT,
    TRL_PROMPT,
    assistant,
    calling,
    user,
    weather_call,
)
from tests.dpo_core.data.test_feedback import CALL, CALLS, CHAT, CONVERSATIONS, PREFERENCE, TOOL, lines, refusal


def called(**changes: object) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": [{**CALL, **changes}]}


def arguments(given: object) -> dict[str, object]:
    return called(function={"name": "look", "arguments": given})


@pytest.mark.parametrize(
    ("chosen", "pointer", "code"),
    [
        ({**CALLS, "tool_calls": {}}, "", "wrong_type"),
        ({**CALLS, "tool_calls": ["look"]}, "/0", "wrong_type"),
        ({**CALLS, "tool_calls": [CALL, CALL]}, "", "duplicate_id"),
        ({**CALLS, "tool_calls": [CALL] * 129}, "", "too_many_calls"),
        (called(id=3), "/0/id", "wrong_type"),
        (called(position=0), "/0/position", "unknown_key"),
        (called(type="custom"), "/0/type", "unsupported"),
        (called(function="look"), "/0/function", "wrong_type"),
        (called(function={"name": "look"}), "/0/function/arguments", "wrong_type"),
        (called(function={"name": None, "arguments": "{}"}), "/0/function/name", "wrong_type"),
        (called(function={"name": " ", "arguments": "{}"}), "/0/function/name", "empty_name"),
        (called(function={"name": "look", "arguments": "{}", "a/b": 1}), "/0/function/a~1b", "unknown_key"),
        (arguments(""), "/0/function/arguments", "invalid_json"),
        (arguments('{"where": '), "/0/function/arguments", "invalid_json"),
        (arguments('{"n": ' + "9" * 5000 + "}"), "/0/function/arguments", "invalid_json"),
        (arguments("[1]"), "/0/function/arguments", "wrong_type"),
        (arguments('"here"'), "/0/function/arguments", "wrong_type"),
        (arguments([1]), "/0/function/arguments", "wrong_type"),
        (arguments('{"where": [0, NaN]}'), "/0/function/arguments", "invalid_number"),
        (arguments('{"where": {"x": 1e999}}'), "/0/function/arguments", "invalid_number"),
        (arguments('{"where": [0, Infinity]}'), "/0/function/arguments/where/1", "invalid_number"),
        (arguments('{"where": 1, "where": 2}'), "/0/function/arguments/where", "duplicate_key"),
        (arguments('{"where": "a\\u0000b"}'), "/0/function/arguments/where", "invalid_text"),
        (arguments("[" * 70 + "]" * 70), None, "too_deep"),
        (arguments('{"a":' * 10**5 + "1" + "}" * 10**5), None, "too_deep"),
    ],
)
def test_a_tool_call_that_cannot_be_used_is_refused_by_pointer(chosen, pointer, code):
    found = refusal(*lines({**CONVERSATIONS, "chosen": [chosen]}))
    assert found.code == code
    assert pointer is None or found.pointer == f"/chosen/0/tool_calls{pointer}"
    assert len(str(found)) < 300


def described(**changes: object) -> list[object]:
    return [TOOL, {"type": "function", "function": {**TOOL["function"], **changes}}]


@pytest.mark.parametrize(
    ("tools", "pointer", "code"),
    [
        (described(parameters={"properties": {"n": {"default": math.nan}}}), "/1/function", "invalid_number"),
        (
            described(parameters={"type": "object", "properties": {"at": {"type": "string"}, "what": None}}),
            "/1/function/parameters/properties/what",
            "null_property",
        ),
        ({"look": {}}, "", "wrong_type"),
        ("look", "", "invalid_json"),
        ('{"look": {}}', "", "wrong_type"),
        ('[{"type": "function", "type": "function"}]', "/0/type", "duplicate_key"),
        (["look"], "/0", "wrong_type"),
        ([{"type": "web_search"}], "/0/type", "unsupported"),
        ([{"name": "look", "parameters": {}}], "/0/name", "unknown_key"),
        ([{"type": "function"}], "/0/function", "wrong_type"),
        (described(name=None), "/1/function/name", "wrong_type"),
        (described(name=""), "/1/function/name", "empty_name"),
        (described(description=1), "/1/function/description", "wrong_type"),
        (described(parameters="{}"), "/1/function/parameters", "wrong_type"),
        (described(params={}), "/1/function/params", "unknown_key"),
    ],
)
@pytest.mark.parametrize("row", [PREFERENCE, CHAT, CONVERSATIONS], ids=["preference", "chat", "conversations"])
def test_a_tool_that_cannot_be_used_is_refused_by_pointer(row, tools, pointer, code):
    where = "/input/tools" if "input" in row else "/tools"
    given = {**row, "input": {**row["input"], "tools": tools}} if "input" in row else {**row, "tools": tools}
    found = refusal(*lines(given))
    assert (found.pointer, found.code) == (f"{where}{pointer}", code)


@pytest.mark.parametrize("row", [TRL, TRL_IMPLICIT, OPENAI_CHAT], ids=["TRL", "TRL implicit", "OpenAI chat"])
def test_tools_as_json_text_are_the_same_tools(row):
    assert list(read_groups(lines({**row, "tools": json.dumps(row["tools"])}))) == list(read_groups(lines(row)))
    assert survey(lines(row)).ignored_keys == ()


@pytest.mark.parametrize("nothing", [None, [], "[]", "null"])
def test_an_empty_list_of_tools_means_no_tools(nothing):
    (group,) = read_groups(lines({**TRL, "tools": nothing, "functions": None, "parallel_tool_calls": None}))
    assert group.tools is None


@pytest.mark.parametrize("without", ["type", "id", "type and id"])
def test_a_call_may_come_without_its_type_and_with_its_place_in_a_stream(without):
    call = {key: value for key, value in weather_call("a", PARIS).items() if key not in without.split()}
    found = read_groups(lines({"messages": [user("How warm is Paris?"), calling({"index": 0, **call})]}))
    assert [group.completions for group in found] == [([calling({"type": "function", **call})],)]


@pytest.mark.parametrize("place", ["prompt", "chosen"])
@pytest.mark.parametrize("tools", [[LIGHT], json.dumps([LIGHT])], ids=["tools", "tools as text"])
def test_an_argument_that_a_table_filled_with_null_is_refused(place, tools):
    def row(arguments):
        call = calling({"type": "function", "function": {"name": "control_light", "arguments": arguments}})
        prompt = [user("Turn on the lights."), *([call, TRL_PROMPT[3]] if place == "prompt" else [])]
        chosen = call if place == "chosen" else assistant("Done!")
        return {"prompt": prompt, "chosen": [chosen], "rejected": [assistant("No.")], "tools": tools}

    assert survey(lines(row({"room": None}))).refusal is None  # it says so itself
    with pytest.raises(InvalidRow, match="a call of the tool 'control_light' whose argument 'by' is null") as caught:
        list(read_groups(lines(row({"room": "attic", "by": None}))))
    assert caught.value.code == "null_argument"

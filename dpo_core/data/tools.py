"""Reads the tools that a prompt offers to the assistant, and the assistant's calls of tools, into the form that chat
templates read. Uses only the standard library."""

from collections.abc import Sequence, Set
from typing import Any, NotRequired, TypedDict, cast

from dpo_core.data.jsonl import Row, parse_within, pointer_to
from dpo_core.data.values import is_finite, shown, string_of

TOOL_KEYS = frozenset({"tools", "functions", "parallel_tool_calls"})
MOST_CALLS = 128  # calls in one message; each answer is compared with all calls
Tool = dict[str, object]  # with the row's keys: "type", and "function" with name, description and parameters

_FILLED = "which tables write into empty cells; in the table, store tools and the arguments of calls as JSON texts."
_FUNCTION_KEYS = {"name", "description", "parameters", "strict", "return"}  # transformers' get_json_schema adds return


class Call(TypedDict):
    """A call of a function: the function's name, and its arguments as a dictionary."""

    name: str
    arguments: dict[str, object]  # a dictionary, because templates turn arguments into JSON themselves


class ToolCall(TypedDict):
    """A call of a tool in a message of the assistant, in OpenAI's format: the id of the call, its type, and the called
    function with its arguments.
    """

    id: NotRequired[str]  # TRL's rows have none
    type: str
    function: Call


def tools_of(row: Row, pointer: str, holder: dict[str, object]) -> list[Tool] | None:
    """Returns the tools that the dictionary `holder` has under the key `tools`; `pointer` is the JSON pointer of
    `holder` in the row. Returns None if there are no tools. Also returns None for an empty list, because some chat
    templates would write a heading for it."""
    if holder.get("functions") not in (None, []):
        remedy = 'is OpenAI\'s older form of tools; use tools instead, each {"type": "function", "function": …}.'
        raise row.invalid(f"{pointer}/functions", "unsupported", remedy)
    if not isinstance(holder.get("parallel_tool_calls"), bool | None):
        raise row.invalid(f"{pointer}/parallel_tool_calls", "wrong_type", "must be true or false.")
    tools = _parsed(row, f"{pointer}/tools", holder.get("tools"))
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise row.invalid(
            f"{pointer}/tools", "wrong_type", "must be a list of tools, or a text with the JSON of such a list."
        )
    return [_tool(row, f"{pointer}/tools/{index}", item) for index, item in enumerate(tools)] or None


def _tool(row: Row, pointer: str, value: object) -> Tool:
    tool = _dictionary(row, pointer, value, {"type", "function"})
    _, function = _function(row, pointer, tool, _FUNCTION_KEYS)
    if function.get("description") is not None:
        string_of(row, f"{pointer}/function/description", function["description"])
    if not is_finite(function):
        raise row.invalid(
            f"{pointer}/function", "invalid_number", "contains NaN or an infinite number; write a finite number."
        )
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None):
        raise row.invalid(f"{pointer}/function/parameters", "wrong_type", "must be an object: a JSON Schema.")
    properties = (parameters or {}).get("properties")
    for key, schema in properties.items() if isinstance(properties, dict) else ():
        if schema is None:
            place = f"{pointer}/function/parameters/properties{pointer_to((key,))}"
            raise row.invalid(place, "null_property", f"is null, {_FILLED}")
    return tool if tool.get("type") else {**tool, "type": "function"}


def refuse_filled(row: Row, tools: Sequence[Tool], calls: Sequence[ToolCall]) -> None:
    """Raises InvalidRow if a call of a tool has an argument that the tool does not have and whose value is null. Tables
    add such arguments: they give all calls the same arguments, and write null into empty cells."""
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        nulls = {key for key, value in arguments.items() if value is None}
        for function in [cast(dict[str, Any], tool["function"]) for tool in tools] if nulls else ():
            properties = (function.get("parameters") or {}).get("properties")
            if function["name"] == name and isinstance(properties, dict) and (unknown := nulls - properties.keys()):
                what = f"has a call of the tool {shown(name)} whose argument {shown(min(unknown))} is null, {_FILLED}"
                raise row.invalid("", "null_argument", what)


def calls_of(row: Row, pointer: str, value: object) -> list[ToolCall]:
    """Returns the tool calls in `value`, which comes from a message of the assistant. Returns an empty list if `value`
    is null."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise row.invalid(pointer, "wrong_type", "must be a list of tool calls.")
    if len(value) > MOST_CALLS:
        what = f"has {len(value)} tool calls; a message can have at most {MOST_CALLS}. Use fewer calls."
        raise row.invalid(pointer, "too_many_calls", what)
    calls = [_call(row, f"{pointer}/{index}", item) for index, item in enumerate(value)]
    ids = [call["id"] for call in calls if "id" in call]
    if len(set(ids)) < len(ids):
        raise row.invalid(
            pointer, "duplicate_id", "has two tool calls with the same id; give each call an id of its own."
        )
    return calls


def _call(row: Row, pointer: str, value: object) -> ToolCall:
    call = _dictionary(row, pointer, value, {"id", "type", "function", "index"})  # calls from a stream have an index
    name, function = _function(row, pointer, call, {"name", "arguments"})
    arguments = _parsed(row, f"{pointer}/function/arguments", function.get("arguments"))
    if not isinstance(arguments, dict):
        what = f"is {shown(arguments)}; it must be a JSON object, which is {{}} for a call without arguments."
        raise row.invalid(f"{pointer}/function/arguments", "wrong_type", what)
    if not is_finite(arguments):
        raise row.invalid(
            f"{pointer}/function/arguments",
            "invalid_number",
            "contains NaN or an infinite number; write a finite number.",
        )
    called: Call = {"name": name, "arguments": arguments}
    if call.get("id") is None:
        return {"type": "function", "function": called}
    return {"id": string_of(row, f"{pointer}/id", call["id"]), "type": "function", "function": called}


def _function(row: Row, pointer: str, holder: dict[str, object], keys: Set[str]) -> tuple[str, dict[str, object]]:
    """Reads the function in `holder`, which is a tool or a call of a tool. Returns two values: the function's name, and
    the dictionary under the key `function`, which describes or calls the function. `keys` are the keys that this
    dictionary may have. Raises InvalidRow unless the tool is a function."""
    if holder.get("type") not in (None, "function"):
        what = f'is {shown(holder.get("type"))}; it must be "function", because tools of other types are not supported.'
        raise row.invalid(f"{pointer}/type", "unsupported", what)
    function = _dictionary(row, f"{pointer}/function", holder.get("function"), keys)
    name = string_of(row, f"{pointer}/function/name", function.get("name"))
    if not name.strip():
        raise row.invalid(f"{pointer}/function/name", "empty_name", "is empty; a function needs a name.")
    return name, function


def _dictionary(row: Row, pointer: str, value: object, keys: Set[str]) -> dict[str, object]:
    """Returns `value`, which must be a dictionary with no other keys than `keys`. Raises InvalidRow for any other
    value."""
    known = ", ".join(sorted(keys))
    if not isinstance(value, dict):
        raise row.invalid(pointer, "wrong_type", f"is {shown(value)}; it must be an object with the keys {known}.")
    for key in value:
        if key not in keys:
            raise row.invalid(
                pointer + pointer_to((key,)),
                "unknown_key",
                f"is not a key of this object, which can have {known}; remove the key.",
            )
    return value


def _parsed(row: Row, pointer: str, value: object) -> object:
    """Parses `value` as JSON if it is a text, and returns the result. Returns any other value unchanged. OpenAI writes
    the arguments of tool calls as texts of JSON, and TRL writes the tools themselves as such texts."""
    return parse_within(row, pointer, value) if isinstance(value, str) else value

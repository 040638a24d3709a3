"""Reads the messages in a row. Refuses values that are no messages, with their JSON pointer. Uses only the standard
library.

The module reads OpenAI's chat format, and ShareGPT's messages with the keys `from` and `value`. It also reads thoughts
(an assistant's reasoning before its answer) under the keys that vLLM, Qwen and gpt-oss use. If the value of a message's
key is null or empty, the key is ignored.
"""

import re
from collections.abc import Sequence
from typing import NotRequired, TypedDict

from dpo_core.data.jsonl import InvalidRow, Row, parse_within, pointer_to
from dpo_core.data.tools import ToolCall, calls_of
from dpo_core.data.values import refuse_empty, says_nothing, shown, string_of


class Message(TypedDict):
    """One message of a conversation, in the form that chat templates read: its role and content and, if the message has
    them, a name, tool calls and thoughts (the reasoning before an answer).
    """

    role: str
    content: str  # empty if a message with calls has no content, as in vLLM: templates would print None
    name: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]  # only in messages of the assistant
    tool_call_id: NotRequired[str]  # only in messages of a tool: the call that the message answers
    reasoning_content: NotRequired[str]  # only in messages of the assistant: thoughts before the answer
    weight: NotRequired[int]  # only in messages of the assistant: 0 if the message is not learned


Text = str | list[Message]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# The roles of ShareGPT, and of other data sets in its format.
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    "system": "system",
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_OWNERS = {"tool_calls": "assistant", "tool_call_id": "tool", **dict.fromkeys(THOUGHTS, "assistant")}
_REMEDIES = {
    "function_call": "is OpenAI's older form of a tool call; use tool_calls instead.",
    "refusal": "is a part of a message that is not supported; remove it.",
    "audio": "is a part of a message that is not supported; remove it.",
}
_MESSAGE_KEYS = {"role", "content", "name", "weight", *_OWNERS, *_REMEDIES}

_TURN = re.compile(r"\n\n(Human|Assistant):")
_TURNS = {"Human": "user", "Assistant": "assistant"}


def prompt_of(row: Row, pointer: str, value: object) -> list[Message]:
    """Returns the messages of a prompt from `value`. Raises InvalidRow if `value` is no list of messages, if the last
    message is the assistant's, or if a tool call of the prompt has no answer."""
    messages = _list_of(row, pointer, value)
    last = f"{pointer}/{len(messages) - 1}"
    if messages[-1]["role"] == "assistant":
        what = "is an assistant message at the end of the prompt; end the prompt with a message of the user or a tool."
        raise row.invalid(last, "invalid_order", what)
    if unanswered := _unanswered(row, pointer, messages):
        raise row.invalid(last, "invalid_order", f"ends the prompt before {_needed(unanswered)}")
    return messages


def completion_of(row: Row, pointer: str, value: object, *, may_be_empty: bool = False) -> list[Message]:
    """Returns the messages of a completion from `value`. The first and the last message must be the assistant's;
    messages of tools or users may be between them. Raises InvalidRow for any other value, and for an empty completion
    unless `may_be_empty`."""
    messages = _list_of(row, pointer, value)
    if len(messages) > 1:
        _unanswered(row, pointer, messages)
    check_completion(row, pointer, messages, may_be_empty=may_be_empty)
    return messages


def check_completion(
    row: Row, pointer: str, messages: Sequence[Message], *, first: int = 0, may_be_empty: bool = False
) -> None:
    """Raises InvalidRow unless the messages are a valid completion, which begins and ends with a message of the
    assistant. `pointer` is the JSON pointer of a list in the row that contains the messages; `first` is the index of
    the completion's first message in this list. `may_be_empty` says whether an answer without text is valid."""
    if len(messages) == 1 and messages[0]["role"] == "assistant" and "weight" not in messages[0]:  # nearly always
        if not may_be_empty:
            refuse_empty_message(row, f"{pointer}/{first}/content", messages[0])
        return
    for end in (0, len(messages) - 1):
        if messages[end]["role"] != "assistant":
            what = "must be an assistant message, because a completion begins and ends with one."
            raise row.invalid(f"{pointer}/{first + end}", "invalid_completion", what)
    for index, message in enumerate(messages):
        place = f"{pointer}/{first + index}"
        if "weight" in message:
            what = (
                "is 0 (do not learn this message), which is not allowed in completions that are compared; "
                "remove the weight or the row."
            )
            raise row.invalid(f"{place}/weight", "invalid_weight", what)
        if message["role"] == "system":
            raise row.invalid(
                place,
                "invalid_completion",
                "is a system message within a completion; move the message into the prompt.",
            )
        if index and message["role"] == messages[index - 1]["role"] == "assistant":
            what = (
                "is an assistant message directly after another one; put a message of the user or a tool between them."
            )
            raise row.invalid(place, "invalid_order", what)
        if message["role"] == "assistant":
            refuse_empty_message(row, f"{place}/content", message)


def messages_of(row: Row, pointer: str, value: object) -> list[Message]:
    """Returns the messages of a conversation from `value`. Raises InvalidRow if `value` is no list of messages. Also
    raises InvalidRow if a tool call lacks an answer, unless the call is in the last message."""
    messages = _list_of(row, pointer, value)
    _unanswered(row, pointer, messages)
    return messages


def refuse_empty_message(row: Row, pointer: str, message: Message) -> None:
    """Raises InvalidRow for a message that has neither text nor tool calls."""
    if not message.get("tool_calls"):
        refuse_empty(row, pointer, message["content"])


def _list_of(row: Row, pointer: str, value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise row.invalid(pointer, "wrong_type", "must be a list of at least one message.")
    return [_message(row, f"{pointer}/{index}", item) for index, item in enumerate(value)]


def _message(row: Row, pointer: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise row.invalid(pointer, "wrong_type", "must be a message: an object with the keys 'role' and 'content'.")
    role, content = value.get("role"), value.get("content")
    if len(value) == 2 and isinstance(role, str) and isinstance(content, str) and role in _ROLES:
        return {"role": _ROLES[role], "content": content}  # nearly all messages; nothing else must be checked
    if "from" in value and role is None:
        return _turn(row, pointer, value)
    role = _role(row, pointer, role)
    _refuse_keys(row, pointer, value, role)
    weight = value.get("weight")
    _refuse_weight(row, pointer, weight, role)
    calls = calls_of(row, f"{pointer}/tool_calls", value.get("tool_calls"))
    if calls and content is None:
        content = ""
    message: Message = {"role": role, "content": _content(row, f"{pointer}/content", content)}
    if value.get("name") is not None:
        message["name"] = string_of(row, f"{pointer}/name", value["name"])
    if calls:
        message["tool_calls"] = calls
    if value.get("tool_call_id") is not None:
        message["tool_call_id"] = string_of(row, f"{pointer}/tool_call_id", value["tool_call_id"])
    if (thoughts := _thoughts(row, pointer, value)) is not None:
        message["reasoning_content"] = thoughts
    if weight == 0:
        message["weight"] = 0
    return message


def _turn(row: Row, pointer: str, value: dict[str, object]) -> Message:
    """Turns a message of a ShareGPT conversation, with the keys `from` and `value`, into a message with a role and
    content."""
    speaker, weight = value["from"], value.get("weight")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        what = (
            f"is {shown(speaker)}; it must be one of {', '.join(_SPEAKERS)}. Write tool calls as messages with `role`."
        )
        raise row.invalid(f"{pointer}/from", "unknown_role", what)
    for key, item in value.items():
        if key not in ("from", "value", "weight") and not says_nothing(item):
            raise row.invalid(
                pointer + pointer_to((key,)), "unknown_key", "is no key that a message can have; remove the key."
            )
    role = _SPEAKERS[speaker]
    _refuse_weight(row, pointer, weight, role)
    turn: Message = {"role": role, "content": string_of(row, f"{pointer}/value", value.get("value"))}
    return {**turn, "weight": 0} if weight == 0 else turn


def _refuse_weight(row: Row, pointer: str, weight: object, role: str) -> None:
    if weight is not None and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        raise row.invalid(
            f"{pointer}/weight",
            "invalid_weight",
            "must be 0 or 1, and only assistant messages can have a weight; correct or remove it.",
        )


def _thoughts(row: Row, pointer: str, value: dict[str, object]) -> str | None:
    """Returns the thoughts of a message (the reasoning before an answer); None if the message has no thoughts. Raises
    InvalidRow if two keys of the message hold different thoughts."""
    keys = [key for key in THOUGHTS if not says_nothing(value.get(key))]
    for key in keys:
        string_of(row, f"{pointer}/{key}", value[key])
        if value[key] != value[keys[0]]:
            raise row.invalid(
                f"{pointer}/{key}", "duplicate_key", f"and the message's key {keys[0]} mean the same; send only one."
            )
    return str(value[keys[0]]) if keys else None


def _role(row: Row, pointer: str, role: object) -> str:
    if role == "function":
        what = "is 'function', OpenAI's older form; use the role 'tool' and give the message a tool_call_id."
        raise row.invalid(f"{pointer}/role", "unsupported", what)
    if not isinstance(role, str) or role not in _ROLES:
        known = "system, developer, user, assistant or tool"
        raise row.invalid(f"{pointer}/role", "unknown_role", f"is {shown(role)}; it must be {known}.")
    return _ROLES[role]


def _refuse_keys(row: Row, pointer: str, value: dict[str, object], role: str) -> None:
    for key, item in value.items():
        if says_nothing(item):
            continue
        if key not in _MESSAGE_KEYS:
            raise row.invalid(
                pointer + pointer_to((key,)), "unknown_key", "is no key that a message can have; remove the key."
            )
        if key in _REMEDIES:
            raise row.invalid(f"{pointer}/{key}", "unsupported", _REMEDIES[key])
        if _OWNERS.get(key, role) != role:
            raise row.invalid(
                f"{pointer}/{key}", "unknown_key", f"is not a key of a message with the role '{role}'; remove the key."
            )


def _content(row: Row, pointer: str, value: object) -> str:
    """Returns the text of a message's content. If the content is a list of parts, their texts are joined with a line
    feed between them, as in vLLM."""
    if not isinstance(value, list):
        return string_of(row, pointer, value)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise row.invalid(
                f"{pointer}/{index}",
                "unsupported",
                "must be a part of type 'text', because other parts are not supported; remove the part.",
            )
        for key, item in part.items():
            if key not in ("type", "text") and not says_nothing(item):
                what = "is not a key of a part of type 'text', of which models see only the text; remove the key."
                raise row.invalid(f"{pointer}/{index}{pointer_to((key,))}", "unknown_key", what)
        texts.append(string_of(row, f"{pointer}/{index}/text", part.get("text")))
    return "\n".join(texts)


def _unanswered(row: Row, pointer: str, messages: Sequence[Message]) -> list[ToolCall]:
    """Returns the calls of tools at the end of a conversation that no tool message has answered. Raises InvalidRow if
    earlier calls have no answer before the next message of another role."""
    calls: list[ToolCall] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            calls.remove(_answered(row, f"{pointer}/{index}", message, calls))
        elif calls:
            raise row.invalid(f"{pointer}/{index}", "invalid_order", f"comes before {_needed(calls)}")
        else:
            calls = list(message.get("tool_calls", ()))
    return calls


def _answered(row: Row, pointer: str, message: Message, calls: Sequence[ToolCall]) -> ToolCall:
    """Returns the one of `calls` that a tool's message answers: the first call that has the message's id. If the
    message names a tool, the call must also have this name."""
    for call in calls:
        if call.get("id") == message.get("tool_call_id") and message.get("name") in (None, call["function"]["name"]):
            return call
    what = (
        "and the message's name match no unanswered tool call before the message; use the id and name of such a call."
    )
    raise row.invalid(f"{pointer}/tool_call_id", "unknown_tool_call", what)


def _needed(calls: Sequence[ToolCall]) -> str:
    """Returns the end of an error message that says what must come before another message: the answer to the first of
    `calls`. An example is "the tool 'search' has answered its call; add its answer as a tool message."
    """
    return f"the tool {shown(calls[0]['function']['name'])} has answered its call; add its answer as a tool message."


_LIKE_JSON = re.compile(r"""\s*(\[\s*)?\{\s*["']""")
_BROKEN_MESSAGES = re.compile(  # messages in Python's notation, or cut off at the end
    r"""\s*(\[\s*\{\s*('(role|content|from|value)'|"(role|from)")\s*:"""
    r"""|\{\s*(['"])(role|from)\5\s*:\s*(['"])(system|user|assistant|human|gpt)\7)"""
)


def opened(row: Row, pointer: str, text: str) -> object:
    """Parses a text that holds messages, or one message, written as JSON, as in many tables. Returns any other text
    unchanged. Raises InvalidRow for messages whose JSON is broken."""
    if not _LIKE_JSON.match(text):
        return text
    try:
        value = parse_within(row, pointer, text)
    except InvalidRow:
        if _BROKEN_MESSAGES.match(text):
            what = (
                "holds messages in a text that is not valid JSON; "
                "write the messages as JSON, in Python with json.dumps."
            )
            raise row.invalid(pointer, "invalid_json", what) from None
        return text  # the text only begins like JSON
    if isinstance(value, dict):
        speaker = value.get("role", value.get("from"))
        is_message = isinstance(speaker, str) and speaker in {*_ROLES, *_SPEAKERS}
        return value if is_message and not value.keys().isdisjoint({"content", "value"}) else text
    is_conversation = isinstance(value, list) and all(
        isinstance(item, dict) and ("role" in item or "from" in item) for item in value
    )
    return value if value and is_conversation else text


def dialogue_of(row: Row, pointer: str, text: str) -> list[Message]:
    """Splits a text of the form "\\n\\nHuman: …\\n\\nAssistant: …", as in HH-RLHF (arXiv 2204.05862), into messages."""
    start, *turns = _TURN.split(text)
    if start.strip() or not turns:
        raise row.invalid(pointer, "wrong_type", 'must be a dialogue that begins with "\\n\\nHuman:".')
    speakers, contents = turns[::2], turns[1::2]
    return [
        {"role": _TURNS[speaker], "content": content.strip()}
        for speaker, content in zip(speakers, contents, strict=True)
    ]

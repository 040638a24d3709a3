"""Messages of a row, each refused by its pointer where it is none. Standard library only."""

import re

from dpo_core.jsonl import Row, pointer_to
from dpo_core.values import refuse_empty, shown, string_of

Message = dict[str, str]  # "role", "content" and, if sent, "name"
Text = str | list[Message]
TOOL_KEYS = frozenset({"tools", "functions", "parallel_tool_calls"})

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_UNBUILT_ROLES = {"tool", "function"}
_UNBUILT_KEYS = {"tool_calls", "tool_call_id", "function_call", "refusal", "audio"}
_MESSAGE_KEYS = {"role", "content", "name", "weight"} | _UNBUILT_KEYS

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def prompt_of(row: Row, pointer: str, value: object) -> list[Message]:
    messages = messages_of(row, pointer, value)
    if messages[-1]["role"] == "assistant":
        last = f"{pointer}/{len(messages) - 1}"
        raise row.invalid(last, "invalid_order", "ends the prompt with an assistant message; end it with the user's.")
    return messages


def completion_of(row: Row, pointer: str, value: object) -> list[Message]:
    messages = messages_of(row, pointer, value)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise row.invalid(pointer, "invalid_completion", "must hold exactly one message, of the assistant.")
    refuse_empty(row, f"{pointer}/0/content", messages[0]["content"])
    return messages


def messages_of(row: Row, pointer: str, value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise row.invalid(pointer, "wrong_type", "must be a list of at least one message.")
    return [_message(row, f"{pointer}/{index}", item) for index, item in enumerate(value)]


def _message(row: Row, pointer: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise row.invalid(pointer, "wrong_type", "must be a message: a dictionary with role and content.")
    for key, item in value.items():
        if key not in _MESSAGE_KEYS:
            raise row.invalid(pointer + pointer_to((key,)), "unknown_key", "is not a key of a message.")
        if key in _UNBUILT_KEYS and item not in (None, []):
            raise row.invalid(f"{pointer}/{key}", "unsupported", "is not supported yet; remove it.")
    role = value.get("role")
    if isinstance(role, str) and role in _UNBUILT_ROLES:
        raise row.invalid(f"{pointer}/role", "unsupported", f"{role} messages are not supported yet; remove the row.")
    if not isinstance(role, str) or role not in _ROLES:
        known = "system, developer, user or assistant"
        raise row.invalid(f"{pointer}/role", "unknown_role", f"is {shown(role)}; it must be {known}.")
    weight = value.get("weight")
    if weight is not None and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        raise row.invalid(f"{pointer}/weight", "invalid_weight", "must be 0 or 1, on an assistant message.")
    message = {"role": _ROLES[role], "content": _content(row, f"{pointer}/content", value.get("content"))}
    if value.get("name") is not None:
        message["name"] = string_of(row, f"{pointer}/name", value["name"])
    return message


def _content(row: Row, pointer: str, value: object) -> str:
    if not isinstance(value, list):
        return string_of(row, pointer, value)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise row.invalid(f"{pointer}/{index}", "unsupported", "must be a text part; no other is supported yet.")
        texts.append(string_of(row, f"{pointer}/{index}/text", part.get("text")))
    return "".join(texts)


def refuse_tools(row: Row, pointer: str, value: dict[str, object]) -> None:
    for key in ("tools", "functions"):
        if value.get(key):
            raise row.invalid(f"{pointer}/{key}", "unsupported", "is not supported yet; remove it.")


def dialogue_of(row: Row, pointer: str, text: str) -> list[Message]:
    """The turns of a dialogue in one text, as in HH-RLHF (arXiv 2204.05862): "\\n\\nHuman: …\\n\\nAssistant: …"."""
    start, *turns = _TURN.split(text)
    if start.strip() or not turns:
        raise row.invalid(pointer, "wrong_type", 'must begin with "\\n\\nHuman:" and its text.')
    speakers, contents = turns[::2], turns[1::2]
    return [
        {"role": _SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(speakers, contents, strict=True)
    ]

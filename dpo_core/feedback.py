"""What people said about completions: `Group`, and the readers of the row formats. Standard library only.

A file is JSON Lines in UTF-8. Its first row decides the format; a row of another format is refused.
A leading byte order mark, CRLF and blank lines are harmless and accepted.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

MAX_LINE_BYTES = 32 * 2**20
MAX_DEPTH = 64  # arrays and objects inside each other; a message needs five

Message = dict[str, str]  # "role", "content" and, if sent, "name"
Text = str | list[Message]
Kind = Literal["pairs", "demonstrations"]


@dataclass(frozen=True)
class Group:
    """A prompt and its completions, best first: one is a demonstration, two are a pair."""

    prompt: Text
    completions: tuple[Text, ...]
    line: int  # where it stands in the file, from 1


class InvalidRow(ValueError):
    """A row that cannot be used: its line from 1, a JSON pointer into it, a code, and a sentence."""

    def __init__(self, line: int, pointer: str, code: str, message: str) -> None:
        super().__init__(line, pointer, code, message)  # all four, so that it survives pickling
        self.line = line
        self.pointer = pointer
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class FeedbackReport:
    """What a file holds."""

    format: str
    kind: Kind
    num_rows: int
    num_groups: int
    num_identical: int  # groups whose completions are all the same: they teach nothing
    ignored_keys: tuple[str, ...]  # columns that no reader uses


def check(lines: Iterable[bytes]) -> FeedbackReport:
    """Read every row. Raises InvalidRow at the first that cannot be used."""
    form, rows, groups, identical, ignored = None, 0, 0, 0, set[str]()
    for form, row in _read_rows(lines):
        rows += 1
        ignored.update(row.value.keys() - form.keys)
        for group in form.read(row):
            groups += 1
            identical += len(group.completions) > 1 and all(c == group.completions[0] for c in group.completions)
    if form is None:
        raise InvalidRow(1, "", "empty_file", "The file holds no rows; it needs at least one JSON dictionary.")
    return FeedbackReport(form.name, form.kind, rows, groups, identical, tuple(sorted(ignored)))


def read_groups(lines: Iterable[bytes], *, first_line: int = 1) -> Iterator[Group]:
    """The groups of a file, in its order. Raises InvalidRow on reaching a row that cannot be used.

    A part of a file is read alike, when `first_line` says where it begins.
    """
    for form, row in _read_rows(lines, first_line):
        yield from form.read(row)


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, never holding more than the longest line that `read_groups` takes."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line


# --- bytes to rows -----------------------------------------------------------------------


class _Row:
    """One parsed line."""

    def __init__(self, line: int, value: dict[str, object]) -> None:
        self.line = line
        self.value = value

    def invalid(self, pointer: str, code: str, what: str) -> InvalidRow:
        where = f"Line {self.line}, {pointer}" if pointer else f"Line {self.line}"
        return InvalidRow(self.line, pointer, code, f"{where}: {what}")


@dataclass(frozen=True)
class _Flaw:
    """Stands where JSON was parsed but must not be accepted, until its pointer is known."""

    code: str
    what: str
    key: str | None = None


_CAN_BE_FLAWED = (str, list, dict, _Flaw)


def _read_rows(lines: Iterable[bytes], first_line: int = 1) -> Iterator[tuple["_Format", _Row]]:
    form = None
    for number, line in enumerate(lines, first_line):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        row = _parse(number, line)
        form = form or _detect(row)
        if not form.matches(row.value):
            raise row.invalid("", "mixed_formats", f"must be {form.name}, as the first row is; {_keys_of(row)}.")
        yield form, row


def _parse(number: int, line: bytes) -> _Row:
    if len(line) > MAX_LINE_BYTES:
        limit = f"Line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB; split or shorten the row."
        raise InvalidRow(number, "", "line_too_long", limit)
    try:
        value = json.loads(line.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise InvalidRow(
            number, "", "invalid_utf8", f"Line {number} is not UTF-8 (byte {error.start + 1}); save the file as UTF-8."
        ) from None
    except RecursionError:
        raise InvalidRow(number, "", "too_deep", f"Line {number} nests more than {MAX_DEPTH} levels.") from None
    except json.JSONDecodeError as error:
        raise _not_jsonl(number, line, f"is not valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError:  # Python converts integers of at most 4300 digits
        raise _not_jsonl(number, line, "holds a number that is too long") from None
    if not isinstance(value, dict | _Flaw):
        raise _not_jsonl(number, line, "is not a dictionary")
    row = _Row(number, value if isinstance(value, dict) else {})
    _refuse_flaws(row, value)
    return row


def _not_jsonl(number: int, line: bytes, what: str) -> InvalidRow:
    start = line[:200].decode(errors="replace").strip()[:40]
    start = "".join(c if c.isprintable() else "\ufffd" for c in start)
    return InvalidRow(
        number,
        "",
        "invalid_jsonl",
        "Expected file to have JSONL format, where every line is a JSON dictionary. "
        f'Line {number} {what} (HINT: line starts with: "{start}").',
    )


def _object(pairs: list[tuple[str, object]]) -> "dict[str, object] | _Flaw":
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return _Flaw("duplicate_key", "this key stands twice; keep one.", twice)


def _constant(name: str) -> _Flaw:
    return _Flaw("invalid_number", f"{name} is not a JSON number.")


def _refuse_flaws(row: _Row, value: object, path: tuple[str | int, ...] = ()) -> None:
    """Refuse the first flaw, in the order of the text. Pointers are built only for it: a line may hold millions."""
    if len(path) >= MAX_DEPTH:
        raise row.invalid("", "too_deep", f"nests more than {MAX_DEPTH} levels.")
    if isinstance(value, _Flaw):
        raise row.invalid(_pointer(path if value.key is None else (*path, value.key)), value.code, value.what)
    if isinstance(value, str):
        _refuse_unusable_text(row, path, value)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, _CAN_BE_FLAWED):
                _refuse_flaws(row, item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_unusable_text(row, path, key)
            if isinstance(item, _CAN_BE_FLAWED):
                _refuse_flaws(row, item, (*path, key))


def _refuse_unusable_text(row: _Row, path: tuple[str | int, ...], text: str) -> None:
    if "\0" in text:
        raise row.invalid(_pointer(path), "invalid_text", "holds a NUL character; remove it.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise row.invalid(_pointer(path), "invalid_text", "holds half of a surrogate pair; remove it.") from None


def _pointer(path: tuple[str | int, ...]) -> str:
    """A JSON pointer, RFC 6901; a lone surrogate in a key must not travel further."""
    keys = (str(key).replace("~", "~0").replace("/", "~1") for key in path)
    return "".join("/" + key for key in keys).encode(errors="replace").decode()


# --- rows to groups ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Format:
    name: str
    kind: Kind
    keys: frozenset[str]
    matches: Callable[[dict[str, object]], bool]
    read: Callable[[_Row], Iterator[Group]]


def _detect(row: _Row) -> _Format:
    for form in _FORMATS:
        if form.matches(row.value):
            return form
    raise row.invalid(
        "",
        "unknown_format",
        "the row is neither OpenAI preference (input, preferred_output, non_preferred_output), nor OpenAI chat "
        f"(messages), nor prompt/chosen/rejected; {_keys_of(row)}.",
    )


def _read_preference(row: _Row) -> Iterator[Group]:
    given = row.value.get("input")
    if not isinstance(given, dict):
        raise row.invalid("/input", "wrong_type", "must be a dictionary with messages.")
    for key in given:
        if key not in _TOOL_KEYS | {"messages"}:
            raise row.invalid(_pointer(("input", key)), "unknown_key", "is not a key of input.")
    _refuse_tools(row, "/input", given)
    prompt = _prompt(row, "/input/messages", given.get("messages"))
    outputs = [_either(row, f"{side}_output", f"{side}_completion") for side in ("preferred", "non_preferred")]
    yield Group(prompt, tuple(_completion(row, f"/{key}", row.value[key]) for key in outputs), row.line)


def _read_chat(row: _Row) -> Iterator[Group]:
    _refuse_tools(row, "", row.value)
    messages = _messages(row, "/messages", row.value["messages"])
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and _weight(row, i) != 0]
    if not trained:
        raise row.invalid("/messages", "nothing_to_train", "has no assistant message whose weight is not 0.")
    for i in trained:
        if i == 0:
            raise row.invalid("/messages/0", "empty_prompt", "is an assistant message with nothing before it.")
        if messages[i - 1]["role"] == "assistant":
            raise row.invalid(
                f"/messages/{i}", "invalid_order", "follows an assistant message; put the user's between."
            )
        _refuse_empty(row, f"/messages/{i}/content", messages[i]["content"])
        yield Group(messages[:i], ([messages[i]],), row.line)


def _read_texts(row: _Row) -> Iterator[Group]:
    for key in ("chosen", "rejected"):
        _refuse_empty(row, f"/{key}", _string(row, f"/{key}", row.value[key]))
    prompt, chosen, rejected = (_string(row, f"/{key}", row.value[key]) for key in ("prompt", "chosen", "rejected"))
    yield Group(prompt, (chosen, rejected), row.line)


def _read_conversations(row: _Row) -> Iterator[Group]:
    _refuse_tools(row, "", row.value)
    prompt = _prompt(row, "/prompt", row.value["prompt"])
    sides = tuple(_completion(row, f"/{key}", row.value[key]) for key in ("chosen", "rejected"))
    yield Group(prompt, sides, row.line)


_PREFERENCE_KEYS = frozenset(
    {"input", "preferred_output", "non_preferred_output", "preferred_completion", "non_preferred_completion"}
)
_PAIR_KEYS = frozenset({"prompt", "chosen", "rejected"})
_TOOL_KEYS = frozenset({"tools", "functions", "parallel_tool_calls"})

_FORMATS = (
    _Format("OpenAI preference", "pairs", _PREFERENCE_KEYS, lambda v: "input" in v, _read_preference),
    _Format(
        "prompt/chosen/rejected conversations",
        "pairs",
        _PAIR_KEYS | _TOOL_KEYS,
        lambda v: v.keys() >= _PAIR_KEYS and isinstance(v["prompt"], list),
        _read_conversations,
    ),
    _Format(
        "prompt/chosen/rejected texts",
        "pairs",
        _PAIR_KEYS,
        lambda v: v.keys() >= _PAIR_KEYS and not isinstance(v["prompt"], list),
        _read_texts,
    ),
    _Format("OpenAI chat", "demonstrations", _TOOL_KEYS | {"messages"}, lambda v: "messages" in v, _read_chat),
)


# --- values ------------------------------------------------------------------------------

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_UNBUILT_ROLES = {"tool", "function"}
_UNBUILT_KEYS = {"tool_calls", "tool_call_id", "function_call", "refusal", "audio"}
_MESSAGE_KEYS = {"role", "content", "name", "weight"} | _UNBUILT_KEYS


def _prompt(row: _Row, pointer: str, value: object) -> list[Message]:
    messages = _messages(row, pointer, value)
    if messages[-1]["role"] == "assistant":
        last = f"{pointer}/{len(messages) - 1}"
        raise row.invalid(last, "invalid_order", "ends the prompt with an assistant message; end it with the user's.")
    return messages


def _completion(row: _Row, pointer: str, value: object) -> list[Message]:
    messages = _messages(row, pointer, value)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise row.invalid(pointer, "invalid_completion", "must hold exactly one message, of the assistant.")
    _refuse_empty(row, f"{pointer}/0/content", messages[0]["content"])
    return messages


def _messages(row: _Row, pointer: str, value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise row.invalid(pointer, "wrong_type", "must be a list of at least one message.")
    return [_message(row, f"{pointer}/{index}", item) for index, item in enumerate(value)]


def _message(row: _Row, pointer: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise row.invalid(pointer, "wrong_type", "must be a message: a dictionary with role and content.")
    for key, item in value.items():
        if key not in _MESSAGE_KEYS:
            raise row.invalid(pointer + _pointer((key,)), "unknown_key", "is not a key of a message.")
        if key in _UNBUILT_KEYS and item not in (None, []):
            raise row.invalid(f"{pointer}/{key}", "unsupported", "is not supported yet; remove it.")
    role = value.get("role")
    if isinstance(role, str) and role in _UNBUILT_ROLES:
        raise row.invalid(f"{pointer}/role", "unsupported", f"{role} messages are not supported yet; remove the row.")
    if not isinstance(role, str) or role not in _ROLES:
        known = "system, developer, user or assistant"
        raise row.invalid(f"{pointer}/role", "unknown_role", f"is {_shown(role)}; it must be {known}.")
    weight = value.get("weight")
    if weight is not None and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        raise row.invalid(f"{pointer}/weight", "invalid_weight", "must be 0 or 1, on an assistant message.")
    message = {"role": _ROLES[role], "content": _content(row, f"{pointer}/content", value.get("content"))}
    if value.get("name") is not None:
        message["name"] = _string(row, f"{pointer}/name", value["name"])
    return message


def _content(row: _Row, pointer: str, value: object) -> str:
    if not isinstance(value, list):
        return _string(row, pointer, value)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise row.invalid(f"{pointer}/{index}", "unsupported", "must be a text part; no other is supported yet.")
        texts.append(_string(row, f"{pointer}/{index}/text", part.get("text")))
    return "".join(texts)


def _string(row: _Row, pointer: str, value: object) -> str:
    if not isinstance(value, str):
        raise row.invalid(pointer, "wrong_type", f"is {_shown(value)}; it must be a text.")
    return value


def _weight(row: _Row, index: int) -> object:
    messages = row.value["messages"]
    assert isinstance(messages, list)  # `_messages` has seen it
    return messages[index].get("weight")


def _either(row: _Row, key: str, alias: str) -> str:
    present = [name for name in (key, alias) if name in row.value]
    if len(present) == 1:
        return present[0]
    if present:
        raise row.invalid(f"/{alias}", "duplicate_key", f"and {key} mean the same; send one.")
    raise row.invalid(f"/{key}", "missing_key", "is missing.")


def _refuse_tools(row: _Row, pointer: str, value: dict[str, object]) -> None:
    for key in ("tools", "functions"):
        if value.get(key):
            raise row.invalid(f"{pointer}/{key}", "unsupported", "is not supported yet; remove it.")


def _refuse_empty(row: _Row, pointer: str, text: str) -> None:
    if not text.strip():
        raise row.invalid(pointer, "empty_completion", "is empty; a completion needs text.")


def _keys_of(row: _Row) -> str:
    return "its keys are " + (", ".join(key[:40] for key in sorted(row.value)[:10]) or "none")


def _shown(value: object) -> str:
    if isinstance(value, str):
        return repr(value[:40])
    names = {dict: "a dictionary", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "missing or null")

"""Parses JSON Lines into rows, and refuses lines that are not a JSON dictionary in UTF-8. Uses only the standard
library.

A byte order mark at the start, CRLF and blank lines are accepted.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

MAX_LINE_BYTES = 32 * 2**20
POINTER_SHOWN, REASON_SHOWN = 200, 1000  # most characters in an error; a key may be as long as a line
MAX_DEPTH = 64  # levels of nested arrays and objects; a message with a tool call needs eight
_TOO_DEEP = f"nests lists and objects more than {MAX_DEPTH} levels deep; nest them less."


class InvalidRow(ValueError):
    """Raised for a row that cannot be used. The error has the row's line number (from 1), the JSON pointer of the wrong
    value (empty if the whole row is wrong), a code, and a sentence for the user."""

    def __init__(self, line: int, pointer: str, code: str, message: str) -> None:
        super().__init__(line, pointer, code, message)  # unpickling needs all four arguments
        self.line = line
        self.pointer = pointer
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class Row:
    """One parsed line of a file: its line number (`line`), and the dictionary on the line (`value`).

    `columns` is needed for a copy that `renamed` makes. It maps the standard names of columns in the copy to the names
    in the file, so that errors name a column as the file does. None means that no column was renamed.
    """

    def __init__(self, line: int, value: dict[str, object], columns: Mapping[str, str] | None = None) -> None:
        self.line = line
        self.value = value
        self._columns = columns or {}

    def invalid(self, pointer: str, code: str, what: str) -> InvalidRow:
        """Returns an error about the field at `pointer`, or about the whole row if `pointer` is empty. `code` names the
        kind of error, such as wrong_type. `what` is the end of the error's sentence, such as "is not a string."; the
        sentence's subject is the field or the row."""
        if self._columns and pointer:
            first, *rest = pointer[1:].split("/")
            pointer = "/".join([pointer_to((self._columns[first],)) if first in self._columns else f"/{first}", *rest])
        pointer, what = _shortened(pointer, POINTER_SHOWN), _shortened(what, REASON_SHOWN)
        subject = f"the field {pointer}" if pointer else "the row"
        return InvalidRow(self.line, pointer, code, f"Line {self.line}: {subject} {what}")

    def renamed(self, columns: Mapping[str, str]) -> "Row":
        """Returns a copy of the row in which columns have their standard names. `columns` maps standard names, such as
        `prompt`, to the names that the columns have in this row. Raises InvalidRow if such a column is missing, or if
        another column already has the standard name."""
        others = {key: value for key, value in self.value.items() if key not in columns.values()}
        for role, column in columns.items():
            if column not in self.value:
                raise self.invalid(
                    "",
                    "missing_column",
                    f"has no column {column[:40]!r} to read the {role} "
                    "from; give the name of a column that the row has.",
                )
            if role in others:
                what = f"and column {column[:40]!r} would both be read as the {role}; leave one of the columns out."
                raise self.invalid(pointer_to((role,)), "duplicate_key", what)
        return Row(self.line, others | {role: self.value[column] for role, column in columns.items()}, columns)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "…"


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a file. A line longer than `MAX_LINE_BYTES` is yielded in several parts, to bound memory."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line


def read_rows(lines: Iterable[bytes], first_line: int = 1) -> Iterator[Row | InvalidRow]:
    """Parses lines of JSON, and yields a row or an error for each line that is not blank. `first_line` is the line
    number that the first of `lines` has in its file. A line that is too long yields one error; its later parts, which
    `read_lines` yields separately, are skipped."""
    number, has_ended = first_line - 1, True
    for line in lines:
        begins, has_ended = has_ended, len(line) <= MAX_LINE_BYTES or line.endswith(b"\n")
        if not begins:
            continue
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            try:
                yield _parse(number, line)
            except InvalidRow as error:
                yield error


@dataclass(frozen=True)
class _Flaw:
    """A mark in a parsed value, in the place of a part of the JSON that must be refused. `_refuse_flaws` raises the
    error after the parsing, when the JSON pointer of this part is known."""

    code: str
    what: str
    key: str | None = None


_CAN_BE_FLAWED = (str, list, dict, _Flaw)


def _parse(number: int, line: bytes) -> Row:
    if len(line) > MAX_LINE_BYTES:
        limit = f"Line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB; split or shorten the row."
        raise InvalidRow(number, "", "line_too_long", limit)
    if (value := _parse_plain(line)) is not None:
        return Row(number, value)
    try:
        parsed = _loads(line.decode())
    except UnicodeDecodeError as error:
        raise InvalidRow(
            number, "", "invalid_utf8", f"Line {number} is not UTF-8 (byte {error.start + 1}); save the file as UTF-8."
        ) from None
    except RecursionError:
        limit = f"Line {number} {_TOO_DEEP}"
        raise InvalidRow(number, "", "too_deep", limit) from None
    except json.JSONDecodeError as error:
        raise _not_jsonl(number, line, f"is not valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError:  # Python refuses integers of more than 4300 digits
        raise _not_jsonl(number, line, "holds a number of more than 4300 digits") from None
    if not isinstance(parsed, dict | _Flaw):
        raise _not_jsonl(number, line, "is not a dictionary")
    row = Row(number, parsed if isinstance(parsed, dict) else {})
    _refuse_flaws(row, parsed)
    return row


def _parse_plain(line: bytes) -> dict[str, object] | None:
    """Parses a line of JSON quickly. Returns the line's dictionary, or None if the line may have one of the errors that
    `read_rows` refuses. The caller must then parse the line thoroughly. Nearly every line has none of these errors.

    The strict decoder finds most errors, and two quick tests find the other errors. A line without an escape such as
    `\\u0000` or `\\ud800` has no NUL and no half of a surrogate pair. A line with fewer than MAX_DEPTH opening brackets
    does not nest too deeply.
    """
    if _ESCAPED.search(line) or line.count(b"[") + line.count(b"{") >= MAX_DEPTH:
        return None
    try:
        value = _STRICT.decode(line.decode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


_ESCAPED = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")


def parse_within(row: Row, pointer: str, text: str) -> object:
    """Parses `text`, a value in the row that is itself written as JSON, and returns the parsed value. The rules are the
    same as for whole rows. Raises InvalidRow for JSON that cannot be used. `pointer` is the text's JSON pointer, in
    which no key may have a `/` or a `~`."""
    try:
        value = _loads(text)
    except RecursionError:
        raise row.invalid(pointer, "too_deep", _TOO_DEEP) from None
    except ValueError:
        raise row.invalid(
            pointer, "invalid_json", "must be JSON, but its text is not valid JSON; correct the text."
        ) from None
    _refuse_flaws(row, value, tuple(pointer.split("/")[1:]))
    return value


def _loads(text: str) -> object:
    return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)


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
    repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return _Flaw("duplicate_key", "is given twice in one object; keep one.", repeated)


def _constant(name: str) -> "float | _Flaw":
    """Returns the value for `name`, a constant such as NaN that Python parses but JSON does not have. NaN becomes nan,
    because tables write NaN into empty cells; readers that need a number refuse nan later. Any other constant becomes a
    `_Flaw`, an error."""
    return (
        math.nan
        if name == "NaN"
        else _Flaw("invalid_number", f"is {name}, which is not a number in JSON; write a finite number.")
    )


def _strict_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is there twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


_STRICT = json.JSONDecoder(object_pairs_hook=_strict_object, parse_constant=_no_constant)


def _refuse_flaws(row: Row, value: object, path: tuple[str | int, ...] = ()) -> None:
    """Raises InvalidRow for the first part of the value that is marked as an error (a `_Flaw`). Builds a JSON pointer
    only for this part, because a line may hold millions of values."""
    if len(path) >= MAX_DEPTH:
        raise row.invalid("", "too_deep", _TOO_DEEP)
    if isinstance(value, _Flaw):
        raise row.invalid(pointer_to(path if value.key is None else (*path, value.key)), value.code, value.what)
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


def _refuse_unusable_text(row: Row, path: tuple[str | int, ...], text: str) -> None:
    if "\0" in text:
        raise row.invalid(pointer_to(path), "invalid_text", "contains a NUL character (code 0); remove the character.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise row.invalid(
            pointer_to(path), "invalid_text", "contains half of a surrogate pair, which is not a character; remove it."
        ) from None


def pointer_to(path: tuple[str | int, ...]) -> str:
    """Returns the JSON pointer, RFC 6901, of a path of keys and indices. Lone surrogates in keys are replaced, because
    UTF-8 cannot encode them."""
    keys = (str(key).replace("~", "~0").replace("/", "~1") for key in path)
    return "".join("/" + key for key in keys).encode(errors="replace").decode()

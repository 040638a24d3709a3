"""Tests the parsing of JSON Lines: which lines become rows, and how the others are refused."""

import io
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_core.data import jsonl
from dpo_core.data.jsonl import InvalidRow, Row, pointer_to, read_lines, read_rows


def only(line: bytes) -> Row | InvalidRow:
    (found,) = read_rows([line])
    return found


def test_blank_lines_count_but_give_no_row_and_a_mark_at_the_start_is_skipped():
    rows = list(read_rows([b"\xef\xbb\xbf{}\r\n", b"\n", b" \t\n", b'{"a": 1}'], first_line=1))
    assert [(found.line, found.value) for found in rows] == [(1, {}), (4, {"a": 1})]


@pytest.mark.parametrize(
    ("line", "pointer", "code"),
    [
        (b"[1]", "", "invalid_jsonl"),
        (b'{"a": ', "", "invalid_jsonl"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "", "invalid_jsonl"),
        (b'{"a": "\xff"}', "", "invalid_utf8"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "", "too_deep"),
        (b'{"b": {"a/b": 1, "a/b": 2}}', "/b/a~1b", "duplicate_key"),
        (b'{"a": [0, Infinity]}', "/a/1", "invalid_number"),
        (b'{"a": ["x\\u0000"]}', "/a/0", "invalid_text"),
        (b'{"a": "\\ud800"}', "/a", "invalid_text"),
    ],
)
def test_a_line_is_refused_at_its_place(line, pointer, code):
    error = only(line)
    assert isinstance(error, InvalidRow)
    assert (error.line, error.pointer, error.code) == (1, pointer, code)
    assert str(error).startswith(("Line 1", "Expected file to have JSONL format"))


@given(
    st.dictionaries(st.text(max_size=3), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5))
)
def test_every_object_without_nul_is_read_as_json_reads_it(value):
    line = json.dumps(value).encode()
    found = only(line)
    if "\\u0000" in line.decode():
        assert isinstance(found, InvalidRow)
    else:
        assert isinstance(found, Row)
        assert found.value == value


def test_a_long_line_is_one_error_however_many_pieces_it_has(monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 10)
    text = b'{"a": "' + b"x" * 30 + b'"}\n{"b": 1}\n'
    pieces = list(read_lines(io.BytesIO(text)))
    assert len(pieces) == 5
    error, found = read_rows(pieces)
    assert (error.line, error.code) == (1, "line_too_long")
    assert (found.line, found.value) == (2, {"b": 1})


def test_renamed_columns_keep_their_own_names_in_errors():
    found = Row(2, {"question": "a", "b": 1}).renamed({"prompt": "question"})
    assert found.value == {"b": 1, "prompt": "a"}
    assert found.invalid("/prompt/0", "x", "is wrong.").pointer == "/question/0"
    assert str(found.invalid("", "x", "is wrong.")) == "Line 2: the row is wrong."
    for columns, code in (({"prompt": "none"}, "missing_column"), ({"b": "question"}, "duplicate_key")):
        with pytest.raises(InvalidRow) as refused:
            Row(2, {"question": "a", "b": 1}).renamed(columns)
        assert refused.value.code == code


def test_an_error_survives_pickling_and_a_pointer_escapes_its_keys():
    error = pickle.loads(pickle.dumps(InvalidRow(7, "/a", "code", "A sentence.")))
    assert (error.line, error.pointer, error.code, str(error)) == (7, "/a", "code", "A sentence.")
    assert pointer_to(("a~b", 0, "c/d", "\ud800")) == "/a~0b/0/c~1d/?"

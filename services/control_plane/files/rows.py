"""Reads a page of a training file's rows, as prompts with their completions."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_core.data.feedback import read_records
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import MAX_LINE_BYTES, InvalidRow
from services import storage
from services.containers import json_lines
from services.contract import Reading

MOST_BYTES = 2**20  # a page ends after this many bytes of JSON, and has at least one row


def page_of(uri: str, reading: Reading, first: int, limit: int) -> dict[str, Any]:
    """Returns the API's JSON object of at most `limit` rows of the file at `uri`, from the line `first` on. `reading`
    holds the options for reading the rows."""
    rows: list[dict[str, Any]] = []
    num_bytes, following = 0, None
    with storage.open_input(uri) as source:
        for row in _rows(json_lines(source), reading.columns, first):
            if len(rows) == limit or num_bytes > MOST_BYTES:
                following = row["line"]
                break
            rows.append(row)
            num_bytes += len(json.dumps(row))
    return {"object": "dataset.rows", "data": rows, "has_more": following is not None, "next": following}


def _rows(lines: Iterator[bytes], columns: Mapping[str, str], first: int) -> Iterator[dict[str, Any]]:
    try:
        for record in read_records(_from(lines, columns, first), columns=columns):
            if record.line >= first:
                yield _row(record.line, [_group(group) for group in record.groups], record.problem)
    except InvalidRow as damage:  # the rest of the container cannot be read
        yield _row(damage.line, [], damage)


def _from(lines: Iterator[bytes], columns: Mapping[str, str], first: int) -> Iterator[bytes]:
    """Yields the lines of a training file, with a blank line in place of each line before line `first` that need not be
    parsed. The line numbers therefore stay the same.

    The first row is kept, because it says which format the file has. In formats in which several rows may form one
    group (a prompt with its completions), all lines are kept. `columns` maps roles, such as prompt, to the names of the
    file's columns.
    """
    number, has_ended, has_format, is_joined = 0, True, False, False
    for line in lines:
        number += has_ended  # a very long line comes in several parts
        has_ended = len(line) <= MAX_LINE_BYTES or line.endswith(b"\n")
        is_needed = number >= first or is_joined or not has_ended
        if not has_format and line.strip():
            form = next(read_records([line], columns=columns)).format
            has_format, is_joined, is_needed = form is not None, form is not None and form.joins, True
        yield line if is_needed else b"\n"


def _row(line: int, groups: list[dict[str, Any]], problem: InvalidRow | None) -> dict[str, Any]:
    told = problem and {"code": problem.code, "pointer": problem.pointer, "message": problem.message}
    return {"line": line, "groups": groups, "problem": told}


def _group(group: Group) -> dict[str, Any]:
    return {
        "prompt": group.prompt,
        "completions": group.completions,
        "ratings": group.ratings,
        "weight": group.weight,
        "margin": group.margin,
        "tools": group.tools,
        "chat_template_kwargs": group.template_arguments,
    }

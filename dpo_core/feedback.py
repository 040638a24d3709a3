"""What people said about completions: the groups of a file, row by row. Standard library only.

A file is JSON Lines in UTF-8. Its first row decides the format; a row of another format is refused.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dpo_core.formats import Format, detect, keys_of
from dpo_core.groups import Group
from dpo_core.jsonl import InvalidRow, Row, read_rows


@dataclass(frozen=True)
class Record:
    """One row of a file: its groups, or the first thing that is wrong with it."""

    line: int
    format: Format | None  # None: the row is none, or of none of the formats
    groups: Sequence[Group]
    ignored_keys: frozenset[str]  # that no reader uses
    problem: InvalidRow | None


def read_records(
    lines: Iterable[bytes], *, first_line: int = 1, columns: Mapping[str, str] | None = None
) -> Iterator[Record]:
    """Every row of a file, in its order. A part of a file is read alike, when `first_line` says where it begins.

    `columns` names the column of each role, such as {"prompt": "question"}, where the file has names of its own.
    """
    form = None
    for row in read_rows(lines, first_line):
        record = _read(row, form, columns or {})
        form = form or record.format
        yield record


def read_groups(lines: Iterable[bytes], *, first_line: int = 1) -> Iterator[Group]:
    """The groups of a file, in its order. Raises InvalidRow on reaching a row that cannot be used."""
    for record in read_records(lines, first_line=first_line):
        if record.problem:
            raise record.problem
        yield from record.groups


def is_tied(group: Group) -> bool:
    """Whether it has several completions and rates them all alike."""
    return len(group.completions) > 1 and group.ratings is not None and len(set(group.ratings)) == 1


def _read(row: Row | InvalidRow, expected: Format | None, columns: Mapping[str, str]) -> Record:
    form = None
    try:
        if isinstance(row, InvalidRow):
            raise row
        if columns:
            row = row.renamed(columns)
        form = detect(row)
        if expected and form is not expected:
            what = f"must be {expected.name}, as the first row is; {keys_of(row)}."
            raise row.invalid("", "mixed_formats", what)
        return Record(row.line, form, list(form.read(row)), frozenset(row.value.keys() - form.keys), None)
    except InvalidRow as error:
        return Record(row.line, form, (), frozenset(), error)

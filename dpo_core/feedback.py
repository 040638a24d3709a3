"""What people said about completions: the groups of a file, row by row. Standard library only.

A file is JSON Lines in UTF-8. Its first row decides the format; a row of another format is refused.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dpo_core.formats import Format, detect, keys_of
from dpo_core.groups import Group
from dpo_core.jsonl import InvalidRow, Row, read_rows

MOST_JOINED = 1000  # rows of one prompt


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
    run: list[Record] = []
    for row in read_rows(lines, first_line):
        record = _read(row, form, columns or {})
        form = form or record.format
        if form is None or not form.joins:
            yield record
            continue
        if run and not _continues(run[0], record):
            yield from _joined(run)
            run = []
        run.append(record)
    if run:
        yield from _joined(run)


def are_one_group(line: bytes, following: bytes, *, columns: Mapping[str, str] | None = None) -> bool:
    """Whether two neighbouring lines are of one group, so that a file must not be cut between them."""
    records = list(read_records([line, following], columns=columns))
    return len(records) == 2 and not any(record.problem for record in records) and not records[1].groups


def _continues(first: Record, record: Record) -> bool:
    """Whether it rates another answer to the same question."""
    return not (first.problem or record.problem) and first.groups[0].prompt == record.groups[0].prompt


def _joined(run: Sequence[Record]) -> Iterator[Record]:
    """The records of a run: the first has the group of all."""
    first, *others = run
    if first.problem:
        yield first
        return
    try:
        yield replace(first, groups=[_group_of(run)])
    except InvalidRow as problem:
        yield replace(first, groups=(), problem=problem)
    for record in others:
        yield replace(record, groups=())


def _group_of(run: Sequence[Record]) -> Group:
    rows = [record.groups[0] for record in run]
    if not 1 < len(rows) <= MOST_JOINED:
        what = f"rated by {len(rows)} neighbouring rows; it needs 2 to {MOST_JOINED}."
        raise InvalidRow(rows[0].line, "", "too_few_completions", f"Line {rows[0].line}: its prompt is {what}")
    ratings = [rating for group in rows for rating in group.ratings or ()]
    order = sorted(range(len(rows)), key=lambda i: -ratings[i])
    completions = tuple(rows[i].completions[0] for i in order)
    return replace(rows[0], completions=completions, ratings=tuple(ratings[i] for i in order))


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
        unread = form.unread(row)
        return Record(row.line, form, form.read(row, unread), unread, None)
    except InvalidRow as error:
        return Record(row.line, form, (), frozenset(), error)

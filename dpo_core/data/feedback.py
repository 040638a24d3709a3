"""Reads a file of preference data row by row, and turns the rows into groups. Uses only the standard library.

A group is a prompt with its completions. Preference data say which completions are good, or better than others. A file
is JSON Lines in UTF-8. The format of the first row is the format of the file; rows of other formats are refused.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice

from dpo_core.data.formats.column_hints import LONGEST, side_rated
from dpo_core.data.formats.formats import FORMATS, Format, detect, keys_of
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow, Row, read_rows

MOST_JOINED = 1000  # the most rows of one prompt that become one group


@dataclass(frozen=True)
class Record:
    """The result of reading one row of a file: the row's groups (prompts with their completions) or, if the row cannot
    be used, the first error in the row (`problem`). Also holds facts for a report on the file, such as the columns that
    are not read (`ignored_keys`)."""

    line: int
    format: Format | None  # None: the line is no row, or the row has no known format
    groups: Sequence[Group]
    ignored_keys: frozenset[str]  # columns that are not read
    problem: InvalidRow | None
    is_contrary: bool = False  # the row is a pair that, in columns that are not read, rates the rejected answer higher
    subset: str | None = None  # the text in the row's column `subset`, by which benchmarks divide their rows


def read_records(
    lines: Iterable[bytes],
    *,
    first_line: int = 1,
    columns: Mapping[str, str] | None = None,
    formats: Sequence[Format] = FORMATS,
) -> Iterator[Record]:
    """Yields the result of reading each row of a file, in order. `lines` may be a part of the file; `first_line` is the
    line number that the first of `lines` has in the file.

    `columns` is needed only for a file whose columns do not have the standard names, such as `prompt`. It maps the
    standard names to the file's own: {"prompt": "question"} reads prompts from the column `question`. A row whose
    format is not one of `formats` gets an error.
    """
    records = _read_each(lines, first_line, columns or {}, formats)
    for record in records:
        if record.format and record.format.joins:
            yield from _joined(chain([record], records))
        else:
            yield record


def _read_each(
    lines: Iterable[bytes], first_line: int, columns: Mapping[str, str], formats: Sequence[Format]
) -> Iterator[Record]:
    form = None
    for row in read_rows(lines, first_line):
        record = _read(row, form, columns, formats)
        form = form or record.format
        yield record


def are_one_group(line: bytes, following: bytes, *, columns: Mapping[str, str] | None = None) -> bool:
    """Whether a line and the line after it (`following`) belong to one group (a prompt with its completions). They do
    if each of the two lines rates one answer, and both answers are to the same prompt. A file must not be cut between
    such lines. `columns` maps standard names of columns to the file's own, such as {"prompt": "question"}."""
    records = list(read_records([line, following], columns=columns))
    return len(records) == 2 and not any(record.problem for record in records) and not records[1].groups


def _joined(records: Iterable[Record]) -> Iterator[Record]:
    """Joins neighbouring rows that have the same prompt, in a file where each row rates one answer. The record of the
    first of these rows gets one group (the prompt with all answers); the records of the others get no group.

    If only one row has a prompt, or more than MOST_JOINED rows have it, the records of these rows get an error instead.
    """
    for _, run in groupby(records, key=lambda record: record.line if record.problem else record.groups[0].prompt):
        rows = list(islice(run, MOST_JOINED + 1))  # bounded, because all rows of a file may have the same prompt
        if rows[0].problem:
            yield from rows
        elif 1 < len(rows) <= MOST_JOINED:
            yield replace(rows[0], groups=[_group_of(rows)])
            yield from (replace(record, groups=()) for record in rows[1:])
        else:
            number = "only one row has" if len(rows) == 1 else f"more than {MOST_JOINED} rows have"
            yield from (_unjoined(record, number) for record in chain(rows, run))


def _unjoined(record: Record, number: str) -> Record:
    remedy = f"put 2 to {MOST_JOINED} rows with the same prompt one below the other, so that they can be compared."
    what = f"Line {record.line}: {number} this row's prompt here; {remedy}"
    problem = InvalidRow(record.line, "", "too_few_completions", what)
    return replace(record, groups=(), problem=problem)


def _group_of(run: Sequence[Record]) -> Group:
    rows = [record.groups[0] for record in run]
    ratings = [rating for group in rows for rating in group.ratings or ()]
    order = sorted(range(len(rows)), key=lambda i: -ratings[i])
    completions = tuple(rows[i].completions[0] for i in order)
    return replace(rows[0], completions=completions, ratings=tuple(ratings[i] for i in order))


def read_groups(lines: Iterable[bytes], *, first_line: int = 1) -> Iterator[Group]:
    """Yields the groups of a file (a group is a prompt with its completions), in order. `lines` may be a part of the
    file; `first_line` is the line number that the first of `lines` has in the file. Raises InvalidRow at the first row
    that cannot be used."""
    for record in read_records(lines, first_line=first_line):
        if record.problem:
            raise record.problem
        yield from record.groups


def is_tied(group: Group) -> bool:
    """Whether the group (a prompt with its completions) has several completions that all have the same rating."""
    return len(group.completions) > 1 and group.ratings is not None and len(set(group.ratings)) == 1


def _read(
    row: Row | InvalidRow, expected: Format | None, columns: Mapping[str, str], formats: Sequence[Format]
) -> Record:
    form = None
    try:
        if isinstance(row, InvalidRow):
            raise row
        if columns:
            row = row.renamed(columns)
        form = detect(row, formats)
        if expected and form is not expected:
            what = (
                f"has columns ({keys_of(row)}) of another format than the first row, whose format is {expected.name}; "
                "use one format for all rows."
            )
            raise row.invalid("", "mixed_formats", what)
        unread = form.unread(row)
        groups = form.read(row, unread)
        is_contrary, subset = bool(unread) and _is_contrary(row, unread, form), row.value.get("subset")
        subset = subset if isinstance(subset, str) else None
        return Record(row.line, form, groups, unread, None, is_contrary, subset)
    except InvalidRow as error:
        return Record(row.line, form, (), frozenset(), error)


def _is_contrary(row: Row, unread: Set[str], form: Format) -> bool:
    """Whether two scores in a row with a pair say that the rejected completion is better than the chosen one.

    The scores must be in two of the columns `unread`, which the row's format does not read, such as `chosen_score` and
    `rejected_score`. False for a row that is no pair, or in which not exactly two of these columns hold scores.
    """
    if form.kind != "pairs":
        return False
    rated = [(side, row.value[key]) for key in unread if len(key) <= LONGEST and (side := side_rated(key))]
    if len(rated) != 2:
        return False
    scores = dict(rated)
    chosen, rejected = scores.get("chosen"), scores.get("rejected")
    return isinstance(chosen, int | float) and isinstance(rejected, int | float) and rejected > chosen

"""What people said about completions: the groups of a file, and what it holds. Standard library only.

A file is JSON Lines in UTF-8. Its first row decides the format; a row of another format is refused.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dpo_core.formats import Format, Group, detect, keys_of
from dpo_core.jsonl import InvalidRow, Row, read_rows
from dpo_core.options import Kind


@dataclass(frozen=True)
class FeedbackReport:
    """What a file holds."""

    format: str
    kind: Kind
    num_rows: int
    num_groups: int
    num_identical: int  # groups whose completions are all the same: they teach nothing
    num_tied: int  # groups whose completions are all rated alike: they say nothing of an order
    num_margins: int  # groups that say by how much the first completion should lead
    ignored_keys: tuple[str, ...]  # columns that no reader uses


def check(lines: Iterable[bytes]) -> FeedbackReport:
    """Read every row. Raises InvalidRow at the first that cannot be used."""
    form, rows, groups, identical, tied, margins, ignored = None, 0, 0, 0, 0, 0, set[str]()
    for form, row in _read_rows(lines, 1):
        rows += 1
        ignored.update(row.value.keys() - form.keys)
        for group in form.read(row):
            groups += 1
            identical += len(group.completions) > 1 and all(c == group.completions[0] for c in group.completions)
            tied += is_tied(group)
            margins += group.margin is not None
    if form is None:
        raise InvalidRow(1, "", "empty_file", "The file holds no rows; it needs at least one JSON dictionary.")
    return FeedbackReport(form.name, form.kind, rows, groups, identical, tied, margins, tuple(sorted(ignored)))


def read_groups(lines: Iterable[bytes], *, first_line: int = 1) -> Iterator[Group]:
    """The groups of a file, in its order. Raises InvalidRow on reaching a row that cannot be used.

    A part of a file is read alike, when `first_line` says where it begins.
    """
    for form, row in _read_rows(lines, first_line):
        yield from form.read(row)


def is_tied(group: Group) -> bool:
    """Whether it has several completions and rates them all alike."""
    return len(group.completions) > 1 and group.ratings is not None and len(set(group.ratings)) == 1


def _read_rows(lines: Iterable[bytes], first_line: int) -> Iterator[tuple[Format, Row]]:
    form = None
    for row in read_rows(lines, first_line):
        own = detect(row)
        form = form or own
        if own is not form:
            raise row.invalid("", "mixed_formats", f"must be {form.name}, as the first row is; {keys_of(row)}.")
        yield form, row

"""Finds groups that repeat or contradict earlier groups of the same file. A group is a prompt with its completions.
Uses only the standard library.

A temporary database on disk holds 64-bit hashes of the texts, so that a billion rows need little memory. The hashes are
those of Python's `hash`, so they can be compared only within one process.
"""

import marshal
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dpo_core.data.groups import Group

AT_A_TIME = 10_000  # rows inserted together
LINES_NAMED = 10


@dataclass(frozen=True)
class Named:
    """A set of lines of a file, such as the lines that repeat earlier lines: their number (`count`), and the line
    numbers of the first ten of them (`lines`)."""

    count: int
    lines: tuple[int, ...]

    def __str__(self) -> str:
        more = f" and {self.count - len(self.lines)} more" if self.count > len(self.lines) else ""
        return f"line {', '.join(map(str, self.lines))}{more}"


@dataclass(frozen=True)
class Duplicates:
    """The groups (prompts with their completions) of a file that repeat or contradict earlier groups. A group
    contradicts an earlier one with the same prompt if it prefers the completion that the earlier one rejects."""

    prompts: Named  # groups with the prompt of an earlier group, whatever their completions
    groups: Named  # groups that are equal to an earlier group
    contradictions: Named  # groups that prefer the completion that an earlier group of the same prompt rejected


def find_duplicates(groups: Iterable[Group]) -> Duplicates:
    """Compares all groups (prompts with their completions) of a file, and returns the lines of the groups that repeat
    or contradict an earlier group."""
    database = sqlite3.connect("")  # makes a temporary file, which SQLite removes
    try:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("CREATE TABLE groups (line, prompt, best, worst, completions)")
        rows = map(_row, groups)
        while batch := list(islice(rows, AT_A_TIME)):
            database.executemany("INSERT INTO groups VALUES (?, ?, ?, ?, ?)", batch)
        database.execute(_SHARED_PROMPTS)
        return Duplicates(
            prompts=_named(database, _REPEATED.format(what="prompt")),
            groups=_named(database, _REPEATED.format(what="prompt, completions")),
            contradictions=_named(database, _CONTRADICTING),
        )
    finally:
        database.close()


_SHARED_PROMPTS = """
    CREATE TABLE shared AS
    SELECT * FROM groups WHERE prompt IN (SELECT prompt FROM groups GROUP BY prompt HAVING count(*) > 1) ORDER BY rowid
"""
_REPEATED = """
    SELECT line FROM (SELECT line, row_number() OVER (PARTITION BY {what} ORDER BY line, rowid) AS place FROM shared)
    WHERE place > 1
"""
_CONTRADICTING = """
    SELECT line FROM (
        SELECT line, best, first_value(best) OVER (
            PARTITION BY prompt, min(best, worst), max(best, worst) ORDER BY line, rowid
        ) AS first FROM shared WHERE best != worst
    )
    WHERE best != first
"""


def _named(database: sqlite3.Connection, query: str) -> Named:
    (count,) = database.execute(f"SELECT count(*) FROM ({query})").fetchone()
    lines = database.execute(f"{query} ORDER BY line LIMIT {LINES_NAMED}") if count else ()
    return Named(count, tuple(line for (line,) in lines))


def _row(group: Group) -> tuple[int, int, int, int, int]:
    """Returns the row for a group (a prompt with its completions) in the temporary database that finds duplicates. The
    row has five values:

    - the group's line number
    - a hash of its prompt
    - a hash of its best completion
    - a hash of its worst completion
    - a hash of all its completions with their ratings
    """
    completions = [_digest(text) for text in group.completions]
    best, worst = completions[0], completions[-1]
    if len(completions) == 1:  # a label: a good completion is better than none (0), a bad one worse
        best, worst = (0, best) if group.ratings and not group.ratings[0] else (best, 0)
    return group.line, _digest(group.prompt), best, worst, _digest((completions, group.ratings))


def _digest(value: Any) -> int:
    return hash(marshal.dumps(value, 0))  # for JSON values marshal takes a seventh of the time of repr

"""Groups that a file holds again, or the other way round. Standard library only.

Texts are kept as 64-bit hashes, Python's own, which are keyed anew in each process, in a database on disk that is gone
with its object: a billion rows need no memory.
"""

import marshal
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dpo_core.data.groups import Group

AT_A_TIME = 10_000
LINES_NAMED = 10


@dataclass(frozen=True)
class Named:
    """So many, and the lines of the first ten."""

    count: int
    lines: tuple[int, ...]

    def __str__(self) -> str:
        more = f" and {self.count - len(self.lines)} more" if self.count > len(self.lines) else ""
        return f"line {', '.join(map(str, self.lines))}{more}"


@dataclass(frozen=True)
class Duplicates:
    prompts: Named  # groups whose prompt stood before, with whatever completions
    groups: Named  # groups that stood before, word for word
    contradictions: Named  # groups that prefer what an earlier one, with the same prompt, liked less


def find_duplicates(groups: Iterable[Group]) -> Duplicates:
    database = sqlite3.connect("")  # a file that SQLite names and removes
    try:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("CREATE TABLE groups (line, prompt, best, worst, completions)")
        rows = map(_row, groups)
        while some := list(islice(rows, AT_A_TIME)):
            database.executemany("INSERT INTO groups VALUES (?, ?, ?, ?, ?)", some)
        database.execute(_OF_ONE_PROMPT)
        return Duplicates(
            prompts=_named(database, _AGAIN.format(what="prompt")),
            groups=_named(database, _AGAIN.format(what="prompt, completions")),
            contradictions=_named(database, _TURNED),
        )
    finally:
        database.close()


_OF_ONE_PROMPT = """
    CREATE TABLE alike AS
    SELECT * FROM groups WHERE prompt IN (SELECT prompt FROM groups GROUP BY prompt HAVING count(*) > 1) ORDER BY rowid
"""
_AGAIN = """
    SELECT line FROM (SELECT line, row_number() OVER (PARTITION BY {what} ORDER BY line, rowid) AS place FROM alike)
    WHERE place > 1
"""
_TURNED = """
    SELECT line FROM (
        SELECT line, best, first_value(best) OVER (
            PARTITION BY prompt, min(best, worst), max(best, worst) ORDER BY line, rowid
        ) AS first FROM alike WHERE best != worst
    )
    WHERE best != first
"""


def _named(database: sqlite3.Connection, query: str) -> Named:
    (count,) = database.execute(f"SELECT count(*) FROM ({query})").fetchone()
    lines = database.execute(f"{query} ORDER BY line LIMIT {LINES_NAMED}") if count else ()
    return Named(count, tuple(line for (line,) in lines))


def _row(group: Group) -> tuple[int, int, int, int, int]:
    completions = [_digest(text) for text in group.completions]
    best, worst = completions[0], completions[-1]
    if len(completions) == 1:  # a label of its own: good against none, or none against bad
        best, worst = (0, best) if group.ratings and not group.ratings[0] else (best, 0)
    return group.line, _digest(group.prompt), best, worst, _digest((completions, group.ratings))


def _digest(value: Any) -> int:
    return hash(marshal.dumps(value, 0))  # of what JSON can hold, in a seventh of the time that repr takes

"""What a file of feedback holds, and all that is wrong with it. Standard library only."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from heapq import nsmallest

from dpo_core.data.duplicates import LINES_NAMED, Duplicates, Named, find_duplicates
from dpo_core.data.feedback import Record, is_tied, read_records
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow
from dpo_core.data.messages import Text
from dpo_core.options import Kind

KEYS_NAMED, KEY_SHOWN = 100, 100  # a hostile file has others in every row, of any length


@dataclass(frozen=True)
class Problem:
    """Rows that cannot be used, all for one reason. Pointer and message are those of the first."""

    code: str
    pointer: str  # RFC 6901
    message: str
    rows: Named


@dataclass(frozen=True)
class FeedbackReport:
    """What a file holds."""

    format: str | None  # None: no row of a known format was found
    kind: Kind | None
    num_rows: int
    num_groups: int
    num_identical: int  # groups whose completions are all the same: they teach nothing
    num_tied: int  # groups whose completions are all rated alike: they say nothing of an order
    num_repeating: int  # groups whose best and worst completion begin with the prompt: is it written twice?
    num_margins: int  # groups that say by how much the first completion should lead
    num_chosen_longer: int  # groups whose best completion has more characters than its worst
    num_rejected_longer: int
    ignored_keys: tuple[str, ...]  # columns that no reader uses
    contrary: Named  # pairs with scores of their own, which nothing reads, that rate the rejected completion higher
    duplicates: Duplicates
    problems: tuple[Problem, ...]  # in the order of the file
    is_read_whole: bool = True  # False: the container is damaged, and what stands behind was not read

    @property
    def num_invalid(self) -> int:
        """Rows that cannot be used."""
        return sum(problem.rows.count for problem in self.problems)

    @property
    def refusal(self) -> str | None:
        """In a sentence, why the file cannot be used as it is; None: it can."""
        return self.refusal_beyond(0.0)

    def refusal_beyond(self, max_invalid_share: float) -> str | None:
        """The same where rows that cannot be used are left out, up to this share of all."""
        if not self.problems or (self.is_read_whole and self.num_invalid <= max_invalid_share * self.num_rows):
            return None
        first = self.problems[0].message
        if not self.is_read_whole or (self.num_invalid == 1 and not max_invalid_share):
            return first
        limit = f", and at most {max_invalid_share:.2%} of {self.num_rows} may be" if max_invalid_share else ""
        rest = ", ".join(f"{problem.rows.count} {problem.code}" for problem in self.problems)
        return f"{first} {self.num_invalid} rows cannot be used{limit}: {rest}."


def survey(lines: Iterable[bytes], *, columns: Mapping[str, str] | None = None) -> FeedbackReport:
    """Reads every row, whatever is wrong with the others. `columns` is that of `read_records`."""
    counts = _Counts()
    duplicates = find_duplicates(counts.groups(read_records(lines, columns=columns)))
    if not counts.rows and not counts.problems:
        empty = InvalidRow(1, "", "empty_file", "The file holds no rows; it needs at least one JSON dictionary.")
        counts.add_problem(empty)
    return counts.report(duplicates)


@dataclass
class _Counts:
    """What is counted while the rows pass."""

    format: str | None = None
    kind: Kind | None = None
    rows: int = 0
    of_groups: Counter[str] = field(default_factory=Counter)
    ignored: set[str] = field(default_factory=set)
    problems: dict[str, Problem] = field(default_factory=dict)
    contrary: Named = field(default_factory=lambda: Named(0, ()))
    is_read_whole: bool = True

    def groups(self, records: Iterable[Record]) -> Iterator[Group]:
        try:
            for record in records:
                self.rows += 1
                self._look_at(record)
                for group in record.groups:
                    self._count(group)
                    yield group
        except InvalidRow as damage:  # of the container: nothing can be read behind it
            self.is_read_whole = False
            self.add_problem(damage)

    def _look_at(self, record: Record) -> None:
        if self.format is None and record.format:
            self.format, self.kind = record.format.name, record.format.kind
        if record.ignored_keys and len(self.ignored) < KEYS_NAMED:
            self.ignored |= {key[:KEY_SHOWN] for key in nsmallest(KEYS_NAMED, record.ignored_keys)}
        if record.is_contrary:
            self.contrary = _more(self.contrary, record.line)
        if record.problem:
            self.add_problem(record.problem)

    def _count(self, group: Group) -> None:
        completions, found = group.completions, self.of_groups
        best, worst = _length(completions[0]), _length(completions[-1])
        found["num_groups"] += 1
        found["num_identical"] += 1 < len(completions) == completions.count(completions[0])
        found["num_tied"] += is_tied(group)
        found["num_repeating"] += _repeats(group)
        found["num_margins"] += group.margin is not None
        found["num_chosen_longer"] += best > worst
        found["num_rejected_longer"] += worst > best

    def add_problem(self, found: InvalidRow) -> None:
        known = self.problems.get(found.code)
        first = known or Problem(found.code, found.pointer, found.message, Named(0, ()))
        self.problems[found.code] = replace(first, rows=_more(first.rows, found.line))

    def report(self, duplicates: Duplicates) -> FeedbackReport:
        lengths = ("num_chosen_longer", "num_rejected_longer")
        names = ("num_groups", "num_identical", "num_tied", "num_repeating", "num_margins", *lengths)
        return FeedbackReport(
            format=self.format,
            kind=self.kind,
            num_rows=self.rows,
            **{name: self.of_groups[name] for name in names},
            ignored_keys=tuple(nsmallest(KEYS_NAMED, self.ignored)),
            contrary=self.contrary,
            duplicates=duplicates,
            problems=tuple(self.problems.values()),
            is_read_whole=self.is_read_whole,
        )


def _more(rows: Named, line: int) -> Named:
    return Named(rows.count + 1, rows.lines if len(rows.lines) == LINES_NAMED else (*rows.lines, line))


def _repeats(group: Group) -> bool:
    prompt = group.prompt
    asked = (prompt if isinstance(prompt, str) else prompt[-1]["content"]).rstrip()
    return bool(asked) and _begins(group.completions[0], asked) and _begins(group.completions[-1], asked)


def _begins(text: Text, asked: str) -> bool:
    return (text if isinstance(text, str) else text[0]["content"]).startswith(asked)


def _length(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum([len(message["content"]) for message in text])

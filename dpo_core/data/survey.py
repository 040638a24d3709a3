"""Reports on a file of preference data: its format, its counts of rows and groups (prompts with their completions), and
all its errors. Uses only the standard library."""

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

KEYS_NAMED, KEY_SHOWN = 100, 100  # a hostile file may have other keys in every row, of any length


@dataclass(frozen=True)
class Problem:
    """A reason why rows of a file cannot be used, and all the rows to which it applies. `pointer` and `message`
    describe the error in the first of these rows."""

    code: str
    pointer: str  # RFC 6901
    message: str
    rows: Named


@dataclass(frozen=True)
class FeedbackReport:
    """A report on a file of preference data: its format, its counts of rows and groups, and its problems. A group is a
    prompt with its completions."""

    format: str | None  # None: no row of a known format was found
    kind: Kind | None
    num_rows: int
    num_groups: int
    num_identical: int  # groups whose completions are all the same, which teach nothing
    num_tied: int  # groups whose completions all have the same rating
    num_repeating: int  # groups whose best and worst completion begin with the prompt, perhaps in error
    num_margins: int  # groups with a margin
    num_chosen_longer: int  # groups whose best completion has more characters than its worst
    num_rejected_longer: int
    ignored_keys: tuple[str, ...]  # columns that are not read
    contrary: Named  # pairs that, in columns that are not read, rate the rejected completion higher
    duplicates: Duplicates
    problems: tuple[Problem, ...]  # in the order of the file
    is_read_whole: bool = True  # False: the container is damaged, and the rest was not read

    @property
    def num_invalid(self) -> int:
        """The number of rows of the file that cannot be used."""
        return sum(problem.rows.count for problem in self.problems)

    @property
    def refusal(self) -> str | None:
        """A sentence that says why the file cannot be used in its present form; None if the file can be used."""
        return self.refusal_beyond(0.0)

    def refusal_beyond(self, max_invalid_share: float) -> str | None:
        """Returns a sentence that says why the file cannot be used; None if it can be used without its invalid rows.
        Invalid rows may be at most the share `max_invalid_share` of all rows."""
        if not self.problems or (self.is_read_whole and self.num_invalid <= max_invalid_share * self.num_rows):
            return None
        first = self.problems[0].message
        if not self.is_read_whole or (self.num_invalid == 1 and not max_invalid_share):
            return first
        limit = f" (at most {max_invalid_share:.2%} of {self.num_rows} may be left out)" if max_invalid_share else ""
        rest = ", ".join(f"{problem.rows.count} with {problem.code}" for problem in self.problems)
        return f"{first} In all, {self.num_invalid} rows cannot be used{limit}: {rest}."


def survey(lines: Iterable[bytes], *, columns: Mapping[str, str] | None = None) -> FeedbackReport:
    """Reads all rows of a file, also those after an error, and returns a report on them. `lines` are the lines of the
    file. `columns` maps standard names of columns to the file's own, such as {"prompt": "question"}; None means that
    the file has the standard names."""
    counts = _Counts()
    duplicates = find_duplicates(counts.groups(read_records(lines, columns=columns)))
    if not counts.rows and not counts.problems:
        empty = InvalidRow(
            1, "", "empty_file", "The file has no rows; write at least one row, a JSON object, into the file."
        )
        counts.add_problem(empty)
    return counts.report(duplicates)


@dataclass
class _Counts:
    """Counts rows, groups (prompts with their completions) and problems of a file while its rows are being read."""

    format: str | None = None
    kind: Kind | None = None
    rows: int = 0
    group_counts: Counter[str] = field(default_factory=Counter)
    ignored: set[str] = field(default_factory=set)
    problems: dict[str, Problem] = field(default_factory=dict)
    contrary: Named = field(default_factory=lambda: Named(0, ()))
    is_read_whole: bool = True

    def groups(self, records: Iterable[Record]) -> Iterator[Group]:
        """Yields the groups (prompts with their completions) of the records. Counts every record and group that it
        yields."""
        try:
            for record in records:
                self.rows += 1
                self._count_row(record)
                for group in record.groups:
                    self._count_group(group)
                    yield group
        except InvalidRow as damage:  # the container is damaged, and the rest of the file cannot be read
            self.is_read_whole = False
            self.add_problem(damage)

    def _count_row(self, record: Record) -> None:
        if self.format is None and record.format:
            self.format, self.kind = record.format.name, record.format.kind
        if record.ignored_keys and len(self.ignored) < KEYS_NAMED:
            self.ignored |= {key[:KEY_SHOWN] for key in nsmallest(KEYS_NAMED, record.ignored_keys)}
        if record.is_contrary:
            self.contrary = _with_line(self.contrary, record.line)
        if record.problem:
            self.add_problem(record.problem)

    def _count_group(self, group: Group) -> None:
        completions, counts = group.completions, self.group_counts
        best, worst = _length(completions[0]), _length(completions[-1])
        counts["num_groups"] += 1
        counts["num_identical"] += 1 < len(completions) == completions.count(completions[0])
        counts["num_tied"] += is_tied(group)
        counts["num_repeating"] += _repeats(group)
        counts["num_margins"] += group.margin is not None
        counts["num_chosen_longer"] += best > worst
        counts["num_rejected_longer"] += worst > best

    def add_problem(self, error: InvalidRow) -> None:
        known = self.problems.get(error.code)
        problem = known or Problem(error.code, error.pointer, error.message, Named(0, ()))
        self.problems[error.code] = replace(problem, rows=_with_line(problem.rows, error.line))

    def report(self, duplicates: Duplicates) -> FeedbackReport:
        lengths = ("num_chosen_longer", "num_rejected_longer")
        names = ("num_groups", "num_identical", "num_tied", "num_repeating", "num_margins", *lengths)
        return FeedbackReport(
            format=self.format,
            kind=self.kind,
            num_rows=self.rows,
            **{name: self.group_counts[name] for name in names},
            ignored_keys=tuple(nsmallest(KEYS_NAMED, self.ignored)),
            contrary=self.contrary,
            duplicates=duplicates,
            problems=tuple(self.problems.values()),
            is_read_whole=self.is_read_whole,
        )


def _with_line(rows: Named, line: int) -> Named:
    return Named(rows.count + 1, rows.lines if len(rows.lines) == LINES_NAMED else (*rows.lines, line))


def _repeats(group: Group) -> bool:
    """Whether the best and the worst completion of the group (a prompt with its completions) both begin with the last
    message of the prompt."""
    prompt = group.prompt
    question = (prompt if isinstance(prompt, str) else prompt[-1]["content"]).rstrip()
    return bool(question) and all(_begins(group.completions[i], question) for i in (0, -1))


def _begins(text: Text, start: str) -> bool:
    return (text if isinstance(text, str) else text[0]["content"]).startswith(start)


def _length(text: Text) -> int:
    """Returns the number of characters in a text, or in the contents of all messages if `text` is a list of
    messages."""
    return len(text) if isinstance(text, str) else sum([len(message["content"]) for message in text])

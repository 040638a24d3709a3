"""Counts what happens to the rows of a data file while they are encoded, and puts the counts into sentences for the
user.

The file is encoded in pieces, each a range of lines. The counts of all pieces are added up.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import Field

from dpo_core.config import Truncation
from dpo_core.data.duplicates import LINES_NAMED, Named
from dpo_core.data.jsonl import InvalidRow
from dpo_core.encoding.encode import EncodedGroup
from services.contract import Contract


class Lines(Contract):
    """Says which groups (prompts with their completions) or rows of a file have a property, such as a margin: their
    number (`count`), and the line numbers of the first ten of them (`first`)."""

    count: int = 0
    first: tuple[int, ...] = ()

    def __str__(self) -> str:
        return str(Named(self.count, self.first))


class Reason(Lines):
    """Says which groups (prompts with their completions) or rows of a data file were left out for one reason: their
    number, and the line numbers of the first ten. `sentence` describes the first of them."""

    sentence: str = ""


class Lengths(Contract):
    """Sums up the lengths, in tokens, of all prompts of a data file, of all chosen completions, or of all rejected
    completions: the sum of the lengths (`total`), the largest length (`longest`), and a histogram of the lengths."""

    total: int = 0
    longest: int = 0
    # A power of two → the number of groups whose length is at most this power, and more than half of the power.
    histogram: dict[int, int] = Field(default_factory=dict)


class EncodingReport(Contract):
    """Counts what happened to the rows of a file, or of a piece (a range of lines) of a file, while they were encoded.

    A group is a prompt with its completions. Lengths are counted for prompts, for chosen (best) completions and for
    rejected (worst) completions.
    """

    num_rows: int = 0
    num_groups: int = 0  # groups in these rows
    num_kept: int = 0  # groups to train on
    num_held_out: int = 0  # groups to validate on
    invalid: dict[str, Reason] = Field(default_factory=dict)  # rows that cannot be used, by the code of the reason
    margins: Lines = Lines()  # groups that have a margin
    dropped: dict[str, Reason] = Field(default_factory=dict)  # groups that are left out, by the code of the reason
    truncated: dict[str, Lines] = Field(default_factory=dict)  # groups that were cut, by side
    special_tokens: Lines = Lines()  # groups whose own text holds special tokens of the tokenizer
    unasked: Lines = Lines()  # groups whose prompt lacks the text with which the template begins answers
    unknown: Lines = Lines()  # groups with characters that the tokenizer does not know
    unended: Lines = Lines()  # groups with a completion that ends with none of the model's end tokens
    unread: dict[str, Lines] = Field(default_factory=dict)  # groups with fields that the template does not read
    lengths: dict[str, Lengths] = Field(default_factory=dict)  # lengths by side, before cuts
    chosen_longer: int = 0
    rejected_longer: int = 0
    shortest_too_long: int | None = None  # tokens of the shortest group that was dropped for its length


def merge(reports: Iterable[EncodingReport]) -> EncodingReport:
    """Adds up the reports on several pieces (ranges of lines) of a file. The size of the result does not grow with the
    size of the file, because only the first ten lines of each kind are named."""
    total = EncodingReport()
    for report in reports:
        total = _add(total, report)
    return total


def _add(a: EncodingReport, b: EncodingReport) -> EncodingReport:
    counts = ("num_rows", "num_groups", "num_kept", "num_held_out", "chosen_longer", "rejected_longer")
    shortest = [n for n in (a.shortest_too_long, b.shortest_too_long) if n is not None]
    return EncodingReport(
        **{name: getattr(a, name) + getattr(b, name) for name in counts},
        margins=_add_lines(a.margins, b.margins),
        invalid={key: _add_reasons(a.invalid.get(key), b.invalid.get(key)) for key in a.invalid | b.invalid},
        dropped={key: _add_reasons(a.dropped.get(key), b.dropped.get(key)) for key in a.dropped | b.dropped},
        truncated={key: _add_lines(a.truncated.get(key), b.truncated.get(key)) for key in a.truncated | b.truncated},
        special_tokens=_add_lines(a.special_tokens, b.special_tokens),
        unasked=_add_lines(a.unasked, b.unasked),
        unknown=_add_lines(a.unknown, b.unknown),
        unended=_add_lines(a.unended, b.unended),
        unread={key: _add_lines(a.unread.get(key), b.unread.get(key)) for key in a.unread | b.unread},
        lengths={key: _add_lengths(a.lengths.get(key), b.lengths.get(key)) for key in a.lengths | b.lengths},
        shortest_too_long=min(shortest, default=None),
    )


def _add_lines(a: Lines | None, b: Lines | None) -> Lines:
    a, b = a or Lines(), b or Lines()
    return Lines(count=a.count + b.count, first=tuple(sorted((*a.first, *b.first))[:LINES_NAMED]))


def _add_reasons(a: Reason | None, b: Reason | None) -> Reason:
    first = min((reason for reason in (a, b) if reason), key=lambda reason: reason.first)
    return Reason(**_add_lines(a, b).model_dump(), sentence=first.sentence)


def _add_lengths(a: Lengths | None, b: Lengths | None) -> Lengths:
    a, b = a or Lengths(), b or Lengths()
    histogram = dict(sorted((Counter(a.histogram) + Counter(b.histogram)).items()))
    return Lengths(total=a.total + b.total, longest=max(a.longest, b.longest), histogram=histogram)


class Tally:
    """Counts what happens to the groups (prompts with completions) of one piece, a range of a file's lines, while they
    are encoded."""

    def __init__(self, num_rows: int) -> None:
        self._counts = Counter(num_rows=num_rows)
        self._invalid: dict[str, list[InvalidRow]] = {}
        self._dropped: dict[str, list[int]] = {}
        self._sentences: dict[str, str] = {}
        self._unasked: list[int] = []
        self._unknown: list[int] = []
        self._unended: list[int] = []
        self._unread: dict[str, list[int]] = {}
        self._truncated: dict[str, list[int]] = {}
        self._margins: list[int] = []
        self._lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
        self._special_tokens: list[int] = []
        self._too_long: list[int] = []

    def leave_out(self, row: InvalidRow) -> None:
        """Counts a row of the file that cannot be used and is left out."""
        self._invalid.setdefault(row.code, []).append(row)

    def mark_special(self, line: int) -> None:
        """Counts a group (a prompt with its completions) in which the user's own text contains special tokens of the
        tokenizer. `line` is the number of the group's line in the file."""
        self._special_tokens.append(line)

    def mark_unasked(self, line: int) -> None:
        """Counts a group (a prompt with its completions) whose prompt does not end with the words with which the chat
        template begins an answer, such as <think>. `line` is the number of the group's line in the file."""
        self._unasked.append(line)

    def mark_unknown(self, line: int) -> None:
        """Counts a group (a prompt with its completions) whose text has characters that the tokenizer does not know.
        `line` is the number of the group's line in the file."""
        self._unknown.append(line)

    def mark_unended(self, line: int) -> None:
        """Counts a group (a prompt with its completions) if one of its completions ends with none of the model's end
        tokens. `line` is the number of the group's line in the file."""
        self._unended.append(line)

    def mark_unread(self, what: str, line: int) -> None:
        """Counts a group (a prompt with its completions) whose row has a field that the chat template does not read.
        `what` names the field, and `line` is the number of the group's line in the file."""
        self._unread.setdefault(what, []).append(line)

    def see(self, group: EncodedGroup) -> None:
        """Counts the lengths of a newly encoded group (a prompt with its completions). The method must be called before
        the group is cut to the limit of tokens."""
        sides = _sides(group)
        for side, length in sides.items():
            self._lengths[side].append(length)
        if "rejected" in sides:
            self._counts["chosen_longer"] += sides["chosen"] > sides["rejected"]
            self._counts["rejected_longer"] += sides["rejected"] > sides["chosen"]

    def keep(self, before: EncodedGroup, after: EncodedGroup, *, held_out: bool) -> None:
        """Counts a group (a prompt with its completions) that is kept. `held_out` says whether the group is kept for
        validation (true) or for training.

        `before` and `after` are the group before and after it was cut to the maximum number of tokens.
        """
        self._counts["num_groups"] += 1
        self._counts["num_held_out" if held_out else "num_kept"] += 1
        if before.margin is not None:
            self._margins.append(before.line)
        if after is before:
            return
        now = _sides(after)
        for side, length in _sides(before).items():
            if now[side] < length:
                self._truncated.setdefault(side, []).append(before.line)

    def drop(self, code: str, line: int, sentence: str = "", *, tokens: int | None = None) -> None:
        """Counts a group (a prompt with its completions) that is left out. `line` is the number of its line in the
        file. `code` is the name of the reason, such as too_long, and `sentence` describes it for the user. `tokens` is
        the length of a group that is too long, and None for other reasons."""
        self._sentences.setdefault(code, sentence)
        self._counts["num_groups"] += 1
        self._dropped.setdefault(code, []).append(line)
        if tokens is not None:
            self._too_long.append(tokens)

    def report(self) -> EncodingReport:
        return EncodingReport(
            **self._counts,
            invalid={
                code: _reason([row.line for row in rows], rows[0].message) for code, rows in self._invalid.items()
            },
            margins=_named(self._margins),
            dropped={code: _reason(lines, self._sentences[code]) for code, lines in self._dropped.items()},
            truncated={side: _named(lines) for side, lines in self._truncated.items()},
            special_tokens=_named(self._special_tokens),
            unasked=_named(self._unasked),
            unknown=_named(self._unknown),
            unended=_named(self._unended),
            unread={what: _named(lines) for what, lines in self._unread.items()},
            lengths={side: _distribution(lengths) for side, lengths in self._lengths.items() if lengths},
            shortest_too_long=min(self._too_long, default=None),
        )


def _sides(group: EncodedGroup) -> dict[str, int]:
    best, *others = map(len, group.completion_ids)
    return {"prompt": len(group.prompt_ids), "chosen": best} | ({"rejected": others[-1]} if others else {})


def _named(lines: Sequence[int]) -> Lines:
    return Lines(count=len(lines), first=tuple(lines[:LINES_NAMED]))


def _reason(lines: Sequence[int], sentence: str) -> Reason:
    return Reason(**_named(lines).model_dump(), sentence=sentence)


def _distribution(lengths: Sequence[int]) -> Lengths:
    histogram = Counter(1 << (length - 1).bit_length() for length in lengths)
    return Lengths(total=sum(lengths), longest=max(lengths), histogram=dict(sorted(histogram.items())))


# --- sentences for the user ---------------------------------------------------------------------------

TOO_LONG, TIED, IDENTICAL = "too_long", "tied", "identical"
# For each code: the reason why groups are left out, and the remedy.
_REASONS = {
    TIED: ("all their completions have the same rating, so none is preferred", ""),
    IDENTICAL: ("their completions are identical after the chat template and truncation", ""),
    "template_refused": ("the chat template refuses their messages", "change the messages or the chat template"),
    "template_drops_calls": ("the chat template leaves out their tool calls", "use another chat template"),
    "template_drops_tools": ("the chat template leaves out their tools", "use another chat template"),
    "template_drops_text": ("the chat template leaves out a part of their text", "use another chat template"),
    "template_drops_thoughts": ("the chat template leaves out their thoughts", "use another chat template"),
    "template_not_prefix": (
        "the chat template changes the text of their prompt when an answer follows",
        "correct the chat template",
    ),
    "empty_prompt": ("their prompt has no tokens", "write some text into the prompt"),
    "empty_completion": ("one of their completions has no tokens", "write some text into it"),
}


def left_out(report: EncodingReport, kind: str, limit: int, remedy: str) -> list[str]:
    """Returns sentences for the user about rows and groups (prompts with their completions) that were left out or cut.

    `kind` is the word for a group, such as pairs. `limit` is the most tokens of a group, and `remedy` is the advice for
    groups that have more tokens.
    """
    sentences = [
        f"Left out {reason.count} of {report.num_rows} rows, which cannot be used: {code} ({reason}). {reason.sentence}"
        for code, reason in sorted(report.invalid.items())
    ]
    for code, reason in sorted(report.dropped.items()):
        why, how = (f"they are longer than {limit} tokens", remedy) if code == TOO_LONG else _REASONS[code]
        ending = f"; {how}" if how else ""
        detail = f" {reason.sentence}" if reason.sentence else ""
        sentences.append(f"Left out {reason.count} of {report.num_groups} {kind}: {why} ({reason}){ending}.{detail}")
    for side, lines in report.truncated.items():
        sentences.append(f"Cut the {side} of {lines.count} of {report.num_groups} {kind} to {limit} tokens ({lines}).")
    return sentences


def num_invalid(report: EncodingReport) -> int:
    """Returns the number of rows of a data file that cannot be used, from the report on the file."""
    return sum(reason.count for reason in report.invalid.values())


def marked(report: EncodingReport, kind: str) -> list[str]:
    """Returns warnings for the user about groups (prompts with their completions) that are used but may be wrong.
    `kind` is the word for a group, such as pairs."""
    marks = (
        (
            report.special_tokens,
            "have special tokens of the model, such as its end token, in their text, and the model reads them as such",
            "; remove them from the text if they are not meant as special tokens",
        ),
        (
            report.unasked,
            "have answers without the words with which the chat template begins every answer, such as <think>",
            "; the model learns these answers unchanged. Add thoughts to the answers, or use another chat template",
        ),
        (
            report.unknown,
            "have characters that the tokenizer does not know, so the model never sees them",
            "; use a model whose tokenizer knows these characters",
        ),
        (
            report.unended,
            "have an answer that does not end with an end token of the model, so the policy may not learn to stop",
            "; use a chat template that writes an end token after each answer",
        ),
        *(
            (lines, f"have {what}, which the chat template ignores", "; use another chat template, or change the rows")
            for what, lines in sorted(report.unread.items())
        ),
    )
    return [
        f"{lines.count} of {report.num_groups} {kind} {what} ({lines}){remedy}."
        for lines, what, remedy in marks
        if lines.count
    ]


def lengths_in_words(report: EncodingReport, limit: int, truncation: Truncation) -> str:
    """Returns sentences for the user about the lengths of prompts and completions, before they were cut to the limit of
    tokens. `limit` is this limit, and `truncation` the way of cutting.

    The sentences also say how often the chosen answer is longer than the rejected one.
    """
    sides = [
        f"{side} {lengths.total / sum(lengths.histogram.values()):.0f} (at most {lengths.longest})"
        for side, lengths in report.lengths.items()
    ]
    compared = report.chosen_longer + report.rejected_longer
    bias = (
        (f" The chosen answer is the longer one in {report.chosen_longer / compared:.0%} of the rows.")
        if compared
        else ""
    )
    return f"Average number of tokens: {', '.join(sides)}; max_length {limit}, truncation {truncation}.{bias}"

"""What a check found, printed: colours on a terminal, plain words in a pipe. No text of a file reaches it raw."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from dpo_core.data.survey import FeedbackReport
from services.cli.client import out, safe

if TYPE_CHECKING:
    from services.training.check_program import Tokens
    from services.training.data.file_report import Lengths, Lines
    from services.training.data.preview import Preview

BAR = 40  # characters of the longest bar of a histogram
POINTER_SHOWN = 100


def print_survey(found: FeedbackReport, *, is_refused: bool) -> None:
    _title(f"{found.format or 'no known format'}: {found.num_rows} rows, {found.num_groups} {found.kind or 'groups'}")
    for problem in found.problems:
        _line(f"✗ {problem.rows.count} × {problem.code}, {problem.rows}", "red")
        if problem.pointer:
            _line(f"    at {problem.pointer[:POINTER_SHOWN]}")
        _line(f"    {problem.message}")
    duplicates = found.duplicates
    _count(found.num_identical, "identical: their completions are all the same, and teach nothing")
    _count(found.num_repeating, "whose completions begin with their prompt: it may be written twice")
    _count(found.num_tied, "tied: rated all alike, and left out of training")
    _count(duplicates.prompts.count, f"with a prompt that stood before, {duplicates.prompts}")
    _count(duplicates.groups.count, f"that stood before word for word, {duplicates.groups}")
    turned = f"that prefer what an earlier one liked less, {duplicates.contradictions}"
    _count(duplicates.contradictions.count, turned)
    contrary = f"whose own scores rate the rejected answer higher: are the two exchanged? {found.contrary}"
    _count(found.contrary.count, contrary)
    if compared := found.num_chosen_longer + found.num_rejected_longer:
        _line(f"  the chosen completion is the longer one in {found.num_chosen_longer / compared:.0%}, in characters")
    if found.ignored_keys:
        _line(f"  columns that nothing reads: {', '.join(found.ignored_keys)}", "yellow")
    if is_refused:
        _line("✗ The file would be refused.", "bold red")
    elif found.num_invalid:
        _line(f"✓ {found.num_invalid} rows are left out, every other can be used.", "green")
    else:
        _line("✓ Every row can be used.", "green")


def print_tokens(tokens: "Tokens") -> None:
    _title(f"{tokens.num_kept} of {tokens.num_groups} to train on; limit {tokens.limit} tokens, {tokens.truncation}")
    for code, reason in tokens.dropped.items():
        _line(f"  {reason.count} left out: {code}, {reason}", "yellow")
        if reason.sentence:
            _line(f"    {reason.sentence}")
    for side, lines in tokens.truncated.items():
        _line(f"  {lines.count} with the {side} cut, {lines}", "yellow")
    _special(tokens.special_tokens)
    _count(
        tokens.unasked.count,
        f"without the words that begin every answer of the chat template, such as <think>, {tokens.unasked}",
    )
    _count(tokens.unknown.count, f"with characters that the tokenizer does not know, {tokens.unknown}")
    _count(tokens.unended.count, f"with an answer that ends with none of the model's end tokens, {tokens.unended}")
    for what, lines in sorted(tokens.unread.items()):
        _count(lines.count, f"with {what}, which the chat template does not read, {lines}")
    if compared := tokens.chosen_longer + tokens.rejected_longer:
        _line(f"  the chosen completion is the longer one in {tokens.chosen_longer / compared:.0%}, in tokens")
    for side, lengths in tokens.lengths.items():
        _histogram(side, lengths)


def print_preview(rows: Sequence["Preview"]) -> None:
    _title("as the model will see them; what is learned is marked")
    for row in rows:
        _line(f"line {row.line}" + (f", left out: {row.dropped}" if row.dropped else ""), "bold")
        if row.prompt:
            _marked(row.prompt, row.chosen, "green")
        if row.rejected is not None:
            _marked("", row.rejected, "red")


def _marked(before: str, learned: str, colour: str) -> None:
    if out.is_terminal:
        out.print(Text.assemble(safe(before), (safe(learned), colour)))
    else:
        out.print(Text(safe(f"{before}⟦{learned}⟧")))


def _histogram(side: str, lengths: "Lengths") -> None:
    most, number = max(lengths.histogram.values()), sum(lengths.histogram.values())
    _line(f"  {side}: {lengths.total / number:.0f} tokens on average, at most {lengths.longest}")
    for length, count in lengths.histogram.items():
        _line(f"    ≤ {length:>7} {'█' * max(1, BAR * count // most)} {count}", "cyan")


def _special(lines: "Lines") -> None:
    if lines.count:
        _line(f"  {lines.count} with special tokens of the model in their text, {lines}", "yellow")


def _count(count: int, what: str) -> None:
    if count:
        _line(f"  {count} {what}", "yellow")


def _title(text: str) -> None:
    _line(text, "bold")


def _line(text: str, style: str = "") -> None:
    out.print(Text(safe(text), style=style))

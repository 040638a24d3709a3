"""Prints the report on a checked data file: with colours on a terminal, as plain text in a pipe.

Control characters in text that the report quotes from the file do not reach the terminal.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from dpo_core.data.survey import FeedbackReport
from services.cli.client import out, safe

if TYPE_CHECKING:
    from services.training.check_program import Tokens
    from services.training.data.file_report import Lengths, Lines
    from services.training.data.preview import Preview

BAR = 40  # length of the longest bar of a histogram, in characters
POINTER_SHOWN = 100


def print_survey(found: FeedbackReport, *, is_refused: bool) -> None:
    _title(f"{found.format or 'no known format'}: {found.num_rows} rows, {found.num_groups} {found.kind or 'groups'}")
    for problem in found.problems:
        _line(f"✗ {problem.rows.count} × {problem.code}, {problem.rows}", "red")
        if problem.pointer:
            _line(f"    at {problem.pointer[:POINTER_SHOWN]}")
        _line(f"    {problem.message}")
    duplicates = found.duplicates
    _count(found.num_identical, "whose completions are all identical, so that training learns nothing from them")
    _count(found.num_repeating, "whose completions begin with the prompt: does the prompt occur twice?")
    _count(found.num_tied, "whose completions all have the same rating; these are left out of training")
    _count(duplicates.prompts.count, f"with the same prompt as an earlier one, {duplicates.prompts}")
    _count(duplicates.groups.count, f"that repeat an earlier one word for word, {duplicates.groups}")
    turned = f"that contradict the preference of an earlier one, {duplicates.contradictions}"
    _count(duplicates.contradictions.count, turned)
    contrary = f"whose scores rate the rejected answer higher: are chosen and rejected swapped? {found.contrary}"
    _count(found.contrary.count, contrary)
    if compared := found.num_chosen_longer + found.num_rejected_longer:
        _line(f"  the chosen completion is the longer one in {found.num_chosen_longer / compared:.0%}, in characters")
    if found.ignored_keys:
        _line(f"  columns that are not used: {', '.join(found.ignored_keys)}", "yellow")
    if is_refused:
        _line("✗ The file would be refused.", "bold red")
    elif found.num_invalid:
        _line(f"✓ {found.num_invalid} rows are left out; all other rows can be used.", "green")
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
        f"with an answer that lacks the chat template's usual beginning, such as <think>, {tokens.unasked}",
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
    _title("rows as the model will see them; the text that the model learns is marked")
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

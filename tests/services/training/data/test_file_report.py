"""Tests the counts of what happens to rows while they are encoded: the counts of pieces add up to those of the file."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dpo_core.data.jsonl import InvalidRow
from dpo_core.encoding.encode import EncodedGroup
from services.training.data.file_report import Tally, left_out, lengths_in_words, marked, merge, num_invalid

LINES = st.lists(
    st.sampled_from(["invalid", "long", "refused", "whole", "cut", "held out", "special", "unread"]),
    min_size=1,
    max_size=40,
)


def group(line: int, length: int = 3) -> EncodedGroup:
    return EncodedGroup([1] * length, ([1] * (1 + line % 5), [1] * (1 + line % 3)), None, line)


def count(tally: Tally, line: int, fate: str) -> None:
    whole = group(line)
    match fate:
        case "invalid":
            tally.leave_out(InvalidRow(line, "", f"code_{line % 2}", f"Line {line} is wrong."))
        case "long":
            tally.see(whole)
            tally.drop("too_long", line, tokens=100 - line)
        case "refused":
            tally.drop("empty_prompt", line, f"line {line}")
        case _:
            tally.see(whole)
            if fate == "special":
                tally.mark_special(line)
            if fate == "unread":
                tally.mark_unread("tools", line)
            after = group(line, 2) if fate == "cut" else whole
            tally.keep(whole, after, held_out=fate == "held out")


def tally_of(fates: list[tuple[int, str]]) -> Tally:
    tally = Tally(len(fates))
    for line, fate in fates:
        count(tally, line, fate)
    return tally


@given(LINES, st.integers(1, 10))
def test_the_counts_of_pieces_add_up_to_those_of_the_file_in_any_order(fates: list[str], size: int) -> None:
    numbered = list(enumerate(fates, 1))
    whole = tally_of(numbered).report()
    pieces = [tally_of(numbered[start : start + size]).report() for start in range(0, len(numbered), size)]
    assert merge(pieces) == merge(reversed(pieces)) == merge([whole])
    expected: dict[str, Any] = {name: fates.count(name) for name in set(fates)}
    assert num_invalid(whole) == expected.get("invalid", 0)
    assert whole.num_held_out == expected.get("held out", 0)
    assert whole.num_kept + whole.num_held_out == sum(
        fates.count(n) for n in ("whole", "cut", "held out", "special", "unread")
    )
    assert whole.num_groups == len(fates) - expected.get("invalid", 0)
    assert whole.special_tokens.count == expected.get("special", 0)
    longs = [100 - line for line, fate in numbered if fate == "long"]
    assert whole.shortest_too_long == min(longs, default=None)
    chosen = [1 + line % 5 for line, fate in numbered if fate not in ("invalid", "refused")]
    found = merge(pieces).lengths.get("chosen")
    assert (found and (found.total, found.longest)) == ((sum(chosen), max(chosen)) if chosen else None)


def test_the_user_reads_how_many_were_left_out_cut_and_marked_and_on_which_lines() -> None:
    fates = ["invalid", "long", "cut", "special", "whole", "special"]
    report = tally_of(list(enumerate(fates, 1))).report()
    assert left_out(report, "pairs", 50, "shorten the rows") == [
        "Left out 1 of 6 rows, which cannot be used: code_1 (line 1). Line 1 is wrong.",
        "Left out 1 of 5 pairs: they are longer than 50 tokens (line 2); shorten the rows.",
        "Cut the prompt of 1 of 5 pairs to 50 tokens (line 3).",
    ]
    (warning,) = marked(report, "pairs")
    assert warning.startswith("2 of 5 pairs have special tokens of the model")
    assert "(line 4, 6)" in warning


def test_lengths_are_means_before_cuts_and_ties_have_no_longer_side() -> None:
    tally = Tally(3)
    for chosen, rejected in ((5, 1), (3, 1), (2, 2)):
        tally.see(EncodedGroup([1] * 4, ([1] * chosen, [1] * rejected), None, 1))
    words = lengths_in_words(tally.report(), 64, "drop")
    assert words.startswith(
        "Average number of tokens: prompt 4 (at most 4), chosen 3 (at most 5), rejected 1 (at most 2)"
    )
    assert words.endswith("The chosen answer is the longer one in 100% of the rows.")

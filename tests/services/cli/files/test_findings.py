"""Tests the printed report on a file of rows."""

import json

from dpo_core.data.survey import survey
from services.cli.files.findings import print_preview, print_survey, print_tokens
from services.training.check_program import Tokens
from services.training.data.file_report import Lengths
from services.training.data.preview import Preview

GOOD = {"prompt": "a?", "chosen": "yes", "rejected": "n"}


def rows(*found):
    return survey([json.dumps(row).encode() + b"\n" for row in found])


def test_each_problem_is_told_with_its_lines_and_its_place_and_the_end_says_what_becomes_of_the_file(capsys):
    found = rows(GOOD, GOOD | {"chosen": 5}, GOOD)
    print_survey(found, is_refused=True)
    said = capsys.readouterr().out
    assert f"{found.format}: 3 rows, 2 pairs\n" in said
    assert "✗ 1 × " in said
    assert "line 2\n" in said
    assert "    at /chosen\n" in said
    assert "  1 that repeat an earlier one word for word, line 3\n" in said
    assert said.endswith("✗ The file would be refused.\n")
    print_survey(found, is_refused=False)
    assert capsys.readouterr().out.endswith("✓ 1 rows are left out; all other rows can be used.\n")


def test_a_good_file_has_no_findings(capsys):
    print_survey(rows(GOOD), is_refused=False)
    first, longer, last = capsys.readouterr().out.splitlines()
    assert first.endswith(": 1 rows, 1 pairs")
    assert (longer.strip(), last) == (
        "the chosen completion is the longer one in 100%, in characters",
        "✓ Every row can be used.",
    )


def test_lengths_are_drawn_as_bars_of_which_the_longest_is_forty(capsys):
    lengths = Lengths(total=60, longest=9, histogram={8: 4, 16: 1})
    print_tokens(Tokens(num_groups=5, num_kept=5, limit=128, truncation="drop", lengths={"chosen": lengths}))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "5 of 5 to train on; limit 128 tokens, drop"
    assert said[-3:] == [
        "  chosen: 12 tokens on average, at most 9",
        f"    ≤       8 {'█' * 40} 4",
        f"    ≤      16 {'█' * 10} 1",
    ]


def test_what_is_learned_is_marked_and_control_characters_do_not_reach_the_terminal(capsys):
    print_preview([Preview(line=3, prompt="a\x1b[2J?", chosen="yes"), Preview(line=4, dropped="too_long")])
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == ["line 3", "a\ufffd[2J?⟦yes⟧", "line 4, left out: too_long"]

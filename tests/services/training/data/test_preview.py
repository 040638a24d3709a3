"""Tests the rows that are shown of a file, as the model will see them."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.training.data.preview import MOST_CHARACTERS, Preview, preview, sample
from tests.services.training import test_check_program as check_program_tests
from tests.services.training.test_check_program import checked

make_recipe = check_program_tests.make_recipe  # fixtures


def test_a_long_text_is_shown_by_its_ends(make_recipe: Any, make_pair: Any, tmp_path: Path) -> None:
    row = make_pair(1)
    row["input"]["messages"][0]["content"] = "x" * 10**6
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    (shown,) = checked(make_recipe(training_uri=str(tmp_path / "long.jsonl")), tmp_path).preview
    assert len(shown.prompt) < MOST_CHARACTERS + 10
    assert "[…]" in shown.prompt


def test_a_sample_is_spread_over_the_file_and_skips_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\n" + b"".join(b"{}\n\n" for _ in range(100)))
    pieces = list(sample(str(tmp_path / "f"), 100, 4))
    assert [piece.first_line for piece in pieces] == [2, 52, 102, 152]
    assert all(piece.size == 3 for piece in pieces)
    assert len(list(sample(str(tmp_path / "f"), 100, 200))) == 100


@pytest.mark.parametrize(("count", "first"), [(2, [1, 6]), (5, [1, 3, 5, 7, 9]), (40, [1, 3, 5, 7, 9])])
def test_a_row_of_a_sample_comes_with_the_others_of_its_group(tmp_path: Path, count: int, first: list[int]) -> None:
    rows = [{"prompt": f"{n // 2}?", "response": "Yes." * n, "helpfulness": n} for n in range(10)]
    (tmp_path / "f").write_text("\n".join(map(json.dumps, rows)) + "\n")
    pieces = list(sample(str(tmp_path / "f"), 10, count))
    assert [piece.num_rows for piece in pieces] == [2] * len(first)
    assert [piece.first_line for piece in pieces] == [line + (line % 2 == 0) for line in first]


def test_a_row_is_shown_as_text_of_the_template_cut_as_in_training(make_recipe: Any, tmp_path: Path) -> None:
    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    row = {"prompt": message("user", "a?"), "rejected": message("assistant", "e")}
    rows = [row | {"chosen": message("assistant", text)} for text in ("bcd", "")]
    (tmp_path / "f").write_text("\n".join(map(json.dumps, rows)) + "\n")

    def shown(number: int, **options: Any) -> Preview:
        recipe = make_recipe(training_uri=str(tmp_path / "f"), **options)
        return preview(recipe, list(sample(recipe.training_uri, 2, 2))[number])

    def texts(row: Preview) -> list[str | None]:
        return [text and text.replace(" ", "") for text in (row.prompt, row.chosen, row.rejected)]

    assert texts(shown(0)) == ["<|user|>a?<|assistant|>", "bcd</s>", "e</s>"]
    assert texts(shown(0, max_length=6, truncation="keep_start")) == ["<|user|>a?<|assistant|>", "bc", "e</s>"]
    too_long = shown(0, max_length=6)
    assert (too_long.dropped, texts(too_long)) == ("too_long", texts(shown(0)))
    wrong = shown(1)
    assert (wrong.line, wrong.dropped, wrong.prompt) == (2, "empty_completion", "")

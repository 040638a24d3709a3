"""Tests which texts and numbers of a row are accepted, and what the refusal of others says."""

import math

import pytest

from dpo_core.data.jsonl import InvalidRow, Row
from dpo_core.data.values import is_finite, number_of, numbers_of, refuse_empty, says_nothing, shown, string_of

ROW = Row(3, {})


@pytest.mark.parametrize(
    ("read", "sentence"),
    [
        (lambda: string_of(ROW, "/a", 7), "Line 3: the field /a is 7; it must be a string."),
        (lambda: string_of(ROW, "/a", None), "Line 3: the field /a is missing or null; it must be a string."),
        (lambda: refuse_empty(ROW, "/a", " \n"), "Line 3: the field /a is an empty completion; "),
        (lambda: number_of(ROW, "/a", True), "Line 3: the field /a is true; it must be a number."),
        (lambda: number_of(ROW, "/a", 2e9), "Line 3: the field /a is 2000000000.0; it must be from -1e+09 to 1e+09."),
        (lambda: number_of(ROW, "/a", math.inf), "Line 3: the field /a is inf; it must be from -1e+09 to 1e+09."),
        (lambda: numbers_of(ROW, "/a", [1], count=2), "Line 3: the field /a must be a list of 2 numbers, one for each"),
        (lambda: numbers_of(ROW, "/a", [1, "b"], count=2), "Line 3: the field /a/1 is 'b'; it must be a number."),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_field_and_limit(read, sentence):
    with pytest.raises(InvalidRow) as refused:
        read()
    assert str(refused.value).startswith(sentence)


def test_numbers_are_taken_up_to_the_largest():
    assert numbers_of(ROW, "/a", [1, -1e9], count=2) == [1.0, -1e9]


def test_what_tables_write_into_empty_cells_says_nothing():
    assert all(map(says_nothing, (None, "", [], {}, math.nan)))
    assert not any(map(says_nothing, (0, False, " ", [None])))


def test_every_number_within_a_value_must_be_finite():
    assert is_finite({"a": [1, {"b": 2.5}]})
    assert not is_finite({"a": [1, {"b": math.inf}]})


def test_a_long_value_is_shown_in_short():
    assert shown("x" * 100) == repr("x" * 40)
    assert (shown([1]), shown({}), shown(1.5)) == ("a list", "a dictionary", "1.5")

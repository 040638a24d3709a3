"""Tests the rules that score answers, and that no pattern takes long."""

import time

import pytest

from services.control_plane.evaluations import rules


@pytest.mark.parametrize(
    ("rule", "text", "pattern", "expected", "score"),
    [
        ("regex", "Aisle four, on the left.", "(?i)aisle (four|five)", None, 1),
        ("regex", "No idea.", "aisle", None, 0),
        ("length", " two  words ", None, None, 2),
        ("length", "", None, None, 0),
        ("exact", " 42\n", None, "42", 1),
        ("exact", "42.", None, "42", 0),
        ("exact", "", None, None, 0),
    ],
)
def test_a_rule_gives_a_text_its_score(
    rule: rules.Rule, text: str, pattern: str | None, expected: str | None, score: float
) -> None:
    assert rules.score(rule, text, pattern=pattern, expected=expected) == score


@pytest.mark.parametrize("pattern", ["(a", "(?=a)", r"\1"])
def test_a_pattern_that_re2_cannot_read_is_refused(pattern: str) -> None:
    with pytest.raises(rules.InvalidPattern):
        rules.check_pattern(pattern)


def test_a_pattern_that_stops_python_takes_linear_time() -> None:
    began = time.monotonic()
    assert rules.score("regex", "a" * 100_000 + "b", pattern="(a+)+$", expected=None) == 0
    assert time.monotonic() - began < 20

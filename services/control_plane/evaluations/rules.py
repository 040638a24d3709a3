"""Scores answers of models by simple rules, which need no other model."""

from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

Rule = Literal["regex", "length", "exact"]


class InvalidPattern(ValueError):
    """Raised for a pattern that is not a regular expression in RE2's syntax. The message says why."""


def check_pattern(pattern: str) -> None:
    """Raises InvalidPattern if the pattern is not a regular expression in RE2's syntax."""
    _matches("", pattern)


def score(rule: Rule, text: str, *, pattern: str | None, expected: str | None) -> float:
    """Returns the score that a rule gives to a text.

    `regex` gives 1 if `pattern` matches anywhere in the text, else 0. `length` gives the number of words. `exact` gives
    1 if the text equals `expected`, apart from white space at both ends, else 0.
    """
    match rule:
        case "regex":
            return float(_matches(text, pattern or ""))
        case "length":
            return float(len(text.split()))
        case "exact":
            return float(expected is not None and text.strip() == expected.strip())


def _matches(text: str, pattern: str) -> bool:
    """Whether the regular expression matches anywhere in the text. RE2's time grows only linearly with the text, for
    any pattern.
    """
    try:
        return bool(pc.match_substring_regex(pa.array([text]), pattern)[0].as_py())
    except pa.ArrowInvalid as error:
        raise InvalidPattern(str(error)) from None

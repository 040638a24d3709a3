"""Scores texts by simple rules, which need no model."""

from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

Rule = Literal["regex", "length", "exact"]


class InvalidPattern(ValueError):
    """Raised for a regular expression that cannot be read. The message says why."""


def check_pattern(pattern: str) -> None:
    """Raises InvalidPattern if the pattern is no regular expression of RE2."""
    _matches("", pattern)


def score(rule: Rule, text: str, *, pattern: str | None, expected: str | None) -> float:
    """Returns the score of a text by a rule.

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
    """Whether the pattern matches in the text. RE2 takes time that is linear in the text, whatever the pattern is."""
    try:
        return bool(pc.match_substring_regex(pa.array([text]), pattern)[0].as_py())
    except pa.ArrowInvalid as error:
        raise InvalidPattern(str(error)) from None

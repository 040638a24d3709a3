"""Reads texts and numbers from a row. Raises an error for a value of another type, with the value's JSON pointer. Uses
only the standard library."""

import json
import math

from dpo_core.data.jsonl import Row

NOTHING: tuple[object, ...] = (None, "", [], {})  # values with which tables and clients fill empty cells
LARGEST = 1e9  # the largest rating, rank, weight or margin


def says_nothing(value: object) -> bool:
    """Whether the value of a column or key is empty: null, NaN, or an empty text, list or dictionary."""
    return value in NOTHING or value != value


def is_finite(value: object) -> bool:
    """Whether all numbers in the value, also in nested lists and dictionaries, are finite. A number may be infinite
    because Python reads a number such as 1e999 in a file as infinity."""
    if isinstance(value, dict | list):
        return all(map(is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def string_of(row: Row, pointer: str, value: object) -> str:
    """Returns `value`, which must be a string. Raises InvalidRow for a value of another type."""
    if not isinstance(value, str):
        raise row.invalid(pointer, "wrong_type", f"is {shown(value)}; it must be a string.")
    return value


def refuse_empty(row: Row, pointer: str, text: str) -> None:
    """Raises InvalidRow if the text of a completion is empty or only spaces."""
    if not text.strip():
        raise row.invalid(
            pointer, "empty_completion", "is an empty completion; write text into the field, or remove the row."
        )


def numbers_of(row: Row, pointer: str, value: object, *, count: int) -> list[float]:
    """Returns `value`, which must be a list of `count` numbers. Raises InvalidRow for any other value."""
    if not isinstance(value, list) or len(value) != count:
        raise row.invalid(pointer, "wrong_type", f"must be a list of {count} numbers, one for each completion.")
    return [number_of(row, f"{pointer}/{index}", item) for index, item in enumerate(value)]


def number_of(row: Row, pointer: str, value: object) -> float:
    """Returns `value`, which must be a number from -LARGEST to LARGEST. Raises InvalidRow for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise row.invalid(pointer, "wrong_type", f"is {shown(value)}; it must be a number.")
    if not abs(value) <= LARGEST:
        raise row.invalid(pointer, "invalid_number", f"is {value}; it must be from {-LARGEST:g} to {LARGEST:g}.")
    return float(value)


def shown(value: object) -> str:
    """Returns a short description of the value for error messages."""
    if isinstance(value, str):
        return repr(value[:40])
    if value is None or value != value:
        return "missing or null"
    if isinstance(value, (dict, list)):
        return "a dictionary" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:40]

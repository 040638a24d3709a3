"""Defines a group (a prompt with its completions, as texts), and reads prompts and completions from rows. Uses only the
standard library."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dpo_core.data.jsonl import Row
from dpo_core.data.messages import Message, Text, check_completion, completion_of, prompt_of
from dpo_core.data.tools import Tool
from dpo_core.data.values import refuse_empty, string_of


@dataclass(frozen=True)
class Group:
    """A group: a prompt and its completions, the best completion first. A group with one completion is a demonstration,
    and one with two completions is a pair. A group may also have ratings of its completions, a weight, a margin, tools
    and arguments of the chat template."""

    prompt: Text
    completions: tuple[Text, ...]
    line: int  # the line in the file, from 1
    ratings: tuple[float, ...] | None = None  # higher is better, equal is a tie; None: only the order counts
    weight: float = 1.0  # of the group's loss
    margin: float | None = None  # the lead in reward that the first completion should have
    tools: list[Tool] | None = None  # the tools that the prompt offers, for the chat template
    template_arguments: dict[str, object] | None = None  # further arguments of the chat template


def best_first(row: Row, prompt: Text, completions: Sequence[Text], ratings: Sequence[float]) -> Group:
    """Returns a group (a prompt with its completions) with the completions sorted by their ratings, the highest first.
    Raises InvalidRow for fewer than two completions."""
    order = sorted(range(len(ratings)), key=lambda i: -ratings[i])
    if len(order) < 2:
        raise row.invalid(
            "",
            "too_few_completions",
            "has one completion, and a ranking needs at least two; add completions, or remove the row.",
        )
    return Group(prompt, tuple(completions[i] for i in order), row.line, tuple(ratings[i] for i in order))


def text_or_messages(row: Row, pointer: str, value: object) -> Text:
    """Returns the prompt in `value`: messages if `value` is a list, otherwise a text. `pointer` is the JSON pointer of
    `value` in the row, for error messages."""
    return prompt_of(row, pointer, value) if isinstance(value, list) else string_of(row, pointer, value)


def completion_like(row: Row, pointer: str, value: object, prompt: Text) -> Text:
    """Returns the completion in `value`: as a list of messages if `prompt` is such a list, as a text if `prompt` is a
    text. Raises InvalidRow if the completion is empty, or not of the same type as `prompt`."""
    return completion_of(row, pointer, value) if isinstance(prompt, list) else filled(row, pointer, value)


def rejected_like(row: Row, pointer: str, value: object, prompt: Text) -> Text:
    """Returns the rejected completion in `value`: as a list of messages if `prompt` is such a list, as a text if
    `prompt` is a text. The completion may be empty; the model then reads only the end-of-sequence token."""
    if isinstance(prompt, list):
        return completion_of(row, pointer, value, may_be_empty=True)
    return string_of(row, pointer, value)


def question(row: Row, column: str) -> list[Message]:
    """Returns the prompt in a column of the row, as messages. The column may hold a list of messages, one message, or
    the text of a user's message."""
    value = row.value[column]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return prompt_of(row, f"/{column}", value)
    return [{"role": "user", "content": string_of(row, f"/{column}", value)}]


def answer(row: Row, pointer: str, value: object, *, may_be_empty: bool = False) -> list[Message]:
    """Returns the completion in `value`, as messages. The value may be a list of messages, one message, or the text of
    an assistant's message. Raises InvalidRow for an empty completion, unless `may_be_empty`."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return completion_of(row, pointer, value, may_be_empty=may_be_empty)
    text = string_of(row, pointer, value)
    if not may_be_empty:
        refuse_empty(row, pointer, text)
    return [{"role": "assistant", "content": text}]


def parted(
    row: Row, columns: Sequence[str], sides: Sequence[list[Message]], *, may_be_empty: Sequence[bool] = (False, True)
) -> tuple[list[Message], tuple[Text, ...]]:
    """Splits two conversations into the prompt with which both begin, and two completions. Returns the prompt, and a
    tuple of the two completions. `sides` are the conversations. `columns` are the names of the columns that hold them,
    for error messages.

    Raises InvalidRow if the first message in which the conversations differ is not the assistant's. `may_be_empty` says
    for each completion whether it may be empty.
    """
    pairs = enumerate(zip(*sides, strict=False))
    border = next((i for i, (one, other) in pairs if one != other), max(map(len, sides)) - 1)
    if border < 1 or any([m["role"] for m in side[border : border + 1]] != ["assistant"] for side in sides):
        what = (
            f"and the field /{columns[0]} must begin with the same messages and first differ in an assistant message."
        )
        raise row.invalid(f"/{columns[1]}", "different_prompts", what)
    prompt = sides[0][:border]
    if prompt[-1]["role"] == "assistant":
        what = "is an assistant message at the end of the prompt; end the prompt with a message of the user or a tool."
        raise row.invalid(f"/{columns[0]}/{border - 1}", "invalid_order", what)
    for column, side, empty in zip(columns, sides, may_be_empty, strict=True):
        check_completion(row, f"/{column}", side[border:], first=border, may_be_empty=empty)
    return prompt, tuple(side[border:] for side in sides)


def completions_of(row: Row, column: str) -> list[object]:
    """Returns the list in the row's column. Raises InvalidRow if the column holds no list, or an empty list."""
    value = row.value[column]
    if not isinstance(value, list) or not value:
        raise row.invalid(f"/{column}", "wrong_type", "must be a list of at least one completion.")
    return value


def items(row: Row, column: str, *keys: str) -> Iterator[dict[str, object]]:
    """Yields the dictionaries of the list in the row's column. Raises InvalidRow for an element that is no dictionary
    with all of `keys`."""
    for number, item in enumerate(completions_of(row, column)):
        if not isinstance(item, dict) or not item.keys() >= set(keys):
            what = f"must be an object with the keys {' and '.join(keys)}."
            raise row.invalid(f"/{column}/{number}", "wrong_type", what)
        yield item


def filled(row: Row, pointer: str, value: object) -> str:
    """Returns `value`, which must be a string with text. Raises InvalidRow if the value is blank or no string."""
    text = string_of(row, pointer, value)
    refuse_empty(row, pointer, text)
    return text

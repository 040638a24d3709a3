"""Lists the formats of rows that a model can score: the formats of training data, and two more formats that training
does not read. Uses only the standard library."""

import json
from collections.abc import Iterator

from dpo_core.data.feedback import read_records
from dpo_core.data.formats.formats import FORMATS, OPTIONAL_KEYS, Format, with_system_prompt
from dpo_core.data.formats.readers import SIDES
from dpo_core.data.groups import Group, answer, completions_of, question, rejected_like, text_or_messages
from dpo_core.data.jsonl import InvalidRow, Row


def read_unranked(row: Row) -> Iterator[Group]:
    """Reads a row with a prompt and completions that nobody has ranked. A completion may be empty; the model then reads
    only the end-of-sequence token."""
    prompt = text_or_messages(row, "/prompt", row.value["prompt"])
    values = completions_of(row, "completions")
    completions = (rejected_like(row, f"/completions/{i}", value, prompt) for i, value in enumerate(values))
    yield Group(prompt, tuple(completions), row.line)


def read_best_of(row: Row) -> Iterator[Group]:
    """Reads a row of RewardBench 2 (arXiv 2506.01937): a question, a list of good answers and a list of bad answers.
    Good answers get the rating 1, bad ones 0."""
    answers = [
        (answer(row, f"/{side}/{i}", value, may_be_empty=side == "rejected"), rating)
        for side, rating in zip(SIDES, (1.0, 0.0), strict=True)
        for i, value in enumerate(completions_of(row, side))
    ]
    completions, ratings = zip(*answers, strict=True)
    yield Group(question(row, "prompt"), completions, row.line, ratings)


def _has_lists_of_answers(row: dict[str, object]) -> bool:
    """Whether `chosen` and `rejected` are lists of answers, each a text or a list of messages."""
    sides = [row.get(side) for side in SIDES]
    return "prompt" in row and all(
        isinstance(side, list) and side and isinstance(side[0], str | list) for side in sides
    )


UNRANKED = Format(
    "prompt/completions",
    "`prompt`, `completions` in any order",
    "rankings",
    OPTIONAL_KEYS | {"prompt", "completions"},
    frozenset({"prompt", "completions"}).issubset,
    read_unranked,
)
BEST_OF = Format(
    "RewardBench 2",
    "`prompt`, `chosen` and `rejected` as lists of answers; read as messages",
    "ratings",
    OPTIONAL_KEYS | {"prompt", *SIDES, "models"},  # `models` names those that wrote the answers
    _has_lists_of_answers,
    read_best_of,
)
REQUEST_FORMATS = (with_system_prompt(UNRANKED), UNRANKED)
SCORED_FORMATS = (BEST_OF, *FORMATS, *REQUEST_FORMATS)


def read_in_request(number: int, row: dict[str, object]) -> Group:
    """Returns the group (a prompt with its completions) in a row of a request to score rows. `number` counts the
    request's rows from 1. Raises InvalidRow if the row cannot be read."""
    (record,) = read_records([json.dumps(row).encode()], first_line=number, formats=REQUEST_FORMATS)
    if record.problem:
        raise record.problem
    (group,) = record.groups
    return group


def in_request(error: InvalidRow) -> tuple[str, str]:
    """Turns an error about one row into an error about the whole request, which has several rows. Returns two texts:
    the path of the wrong value, such as `rows.0.prompt.1.content`, and a sentence that begins with this path. The first
    row is `rows.0`."""
    path = f"rows.{error.line - 1}{error.pointer.replace('/', '.')}"
    subject = f"the field {error.pointer} " if error.pointer else "the row "
    what = error.message.removeprefix(f"Line {error.line}: ")
    return path, f"{path} {what.removeprefix(subject)}" if what.startswith(subject) else f"{path}: {what}"

"""Defines the request bodies for feedback, and turns a vote on completions into a row of training data.

The row has one of the formats that training files may have. The code that reads training files checks the row.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema

from dpo_core.data.feedback import read_records
from dpo_core.data.jsonl import InvalidRow
from services.control_plane.core.errors import InvalidRequest

MOST_COMPLETIONS = 16
MOST_BYTES = 2**20  # of one row

_MESSAGE = {"type": "object", "properties": {"role": {"type": "string"}, "content": {"type": "string"}}}
_TEXT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": _MESSAGE}]}
Text = Annotated[Any, WithJsonSchema(_TEXT)]  # a text or messages; `dpo_core.data` checks it

Kind = Literal["pairs", "unpaired", "ratings"]
Form = Literal["messages", "text"]

# How many completions each kind of vote is about.
COUNTS = {"choice": (2, 2), "thumb": (1, 1), "ratings": (2, MOST_COMPLETIONS), "edit": (1, 1)}
FORMATS = {
    ("pairs", "messages"): "prompt/chosen/rejected conversations",
    ("pairs", "text"): "prompt/chosen/rejected texts",
    ("unpaired", "messages"): "prompt/completion/label",
    ("unpaired", "text"): "prompt/completion/label",
    ("ratings", "messages"): "prompt/completions/scores",
    ("ratings", "text"): "prompt/completions/scores",
}


class Completion(BaseModel):
    """A completion that somebody votes on, and the model that wrote the completion."""

    model_config = ConfigDict(extra="forbid")
    completion: Text
    model: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None  # None: a person, or unknown


class CreateFeedback(BaseModel):
    """The JSON body of POST /v1/x/feedback: a prompt, its completions, and one vote on them."""

    model_config = ConfigDict(extra="forbid")
    prompt: Text
    completions: Annotated[list[Completion], Field(min_length=1, max_length=MOST_COMPLETIONS)]
    choice: Annotated[int, Field(ge=0, le=1)] | None = None  # index of the better one of two completions
    thumb: Literal["up", "down"] | None = None  # on one completion
    ratings: list[Annotated[float, Field(allow_inf_nan=False)]] | None = None  # higher is better; one per completion
    edit: Text | None = None  # the one completion, improved
    tools: Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "object"}})] = None
    chat_template_kwargs: Annotated[Any, WithJsonSchema({"type": "object"})] = None


class CreateFeedbackFile(BaseModel):
    """The JSON body of POST /v1/x/feedback/files, which makes a training file of the votes of one kind (such as
    `pairs`) and form (`messages` or `text`).
    """

    model_config = ConfigDict(extra="forbid")
    kind: Kind
    form: Form = "messages"


@dataclass(frozen=True)
class Vote:
    """A vote on completions as a row of training data, with the row's kind (such as `pairs`) and form (`messages` or
    `text`), and the name of the request's field that held the vote.
    """

    name: str  # the field of the request that has the vote
    kind: Kind
    form: Form
    row: dict[str, Any]


def vote_of(body: CreateFeedback) -> Vote:
    """Returns the vote in the body, turned into a row of training data.

    Raises InvalidRequest, which names the invalid field, if the body does not have exactly one vote, if the number of
    completions does not fit the vote, or if a training file cannot have such a row.
    """
    name = _vote_name(body)
    form: Form = "messages" if isinstance(body.prompt, list) else "text"
    row = _Row(form)
    row.put("prompt", body.prompt, "prompt")
    answers = [(each.completion, f"completions.{number}.completion") for number, each in enumerate(body.completions)]
    models: list[str | None] = [each.model for each in body.completions]
    kind: Kind = "pairs"
    if name == "choice":
        better = int(body.choice or 0)
        row.answer("chosen", *answers[better])
        row.answer("rejected", *answers[1 - better])
        models = [models[better], models[1 - better]]
    elif name == "edit":
        row.answer("chosen", body.edit, "edit")
        row.answer("rejected", *answers[0])
        models = [None, *models]
    elif name == "thumb":
        kind = "unpaired"
        row.answer("completion", *answers[0])
        row.put("label", body.thumb == "up", "thumb")
    else:
        kind = "ratings"
        row.answers("completions", answers)
        row.put("scores", body.ratings, "ratings")
    for extra in ("tools", "chat_template_kwargs"):
        if (value := getattr(body, extra)) is not None:
            row.put(extra, value, extra)
    row.check(FORMATS[kind, form])
    return Vote(name, kind, form, row.value | {"feedback": {"models": models}})


def _vote_name(body: CreateFeedback) -> str:
    """Returns the name of the one field of the body that holds a vote: `choice`, `thumb`, `ratings` or `edit`.

    Raises InvalidRequest if the body does not have exactly one vote, or the vote does not fit the number of
    completions.
    """
    given = [name for name in COUNTS if getattr(body, name) is not None]
    if len(given) != 1:
        which = f"has the votes {', '.join(given)}" if given else "has no vote"
        message = f"The request {which}; send exactly one of {', '.join(COUNTS)}."
        raise InvalidRequest(message, param=given[1] if given else None)
    (name,), count = given, len(body.completions)
    least, most = COUNTS[name]
    if not least <= count <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        message = f"The request has {count} completions, but the vote '{name}' needs {wanted}; change the completions."
        raise InvalidRequest(message, param="completions")
    if name == "ratings" and len(body.ratings or ()) != count:
        message = (
            f"The request has {len(body.ratings or ())} ratings for {count} completions; send one rating for each."
        )
        raise InvalidRequest(message, param="ratings")
    return name


class _Row:
    """A row of training data that is being built from a request. Remembers from which field of the request each value
    comes.
    """

    def __init__(self, form: Form) -> None:
        self.value: dict[str, Any] = {}
        self._form = form
        self._fields: dict[str, str] = {}  # fields of the request, by JSON pointer in the row

    def put(self, column: str, value: Any, field: str) -> None:
        self.value[column] = value
        self._fields[f"/{column}"] = field

    def answer(self, column: str, value: Any, field: str) -> None:
        self.put(column, self._formed(f"/{column}", value, field), field)

    def answers(self, column: str, answers: list[tuple[Any, str]]) -> None:
        pointers = [f"/{column}/{number}" for number in range(len(answers))]
        self._fields |= {pointer: field for pointer, (_, field) in zip(pointers, answers, strict=True)}
        self.value[column] = [self._formed(p, *answer) for p, answer in zip(pointers, answers, strict=True)]

    def _formed(self, pointer: str, value: Any, field: str) -> Any:
        """Returns the completion `value` in the form of the prompt: if the prompt is messages, a text becomes a
        message.

        `field` is the request's field that holds the completion, and `pointer` the completion's JSON pointer in the
        row.
        """
        if self._form == "text" or not isinstance(value, str):
            return value
        self._fields[f"{pointer}/0/content"] = field
        return [{"role": "assistant", "content": value}]

    def check(self, format_name: str) -> None:
        """Raises InvalidRequest unless the code that reads training files recognizes the row as a row of the format
        `format_name`."""
        line = json.dumps(self.value, ensure_ascii=False).encode(errors="surrogatepass")
        if len(line) > MOST_BYTES:
            message = (
                f"The vote's row has {len(line)} bytes, and a row may have at most {MOST_BYTES}; send shorter texts."
            )
            raise InvalidRequest(message, param="completions")
        (record,) = read_records([line])
        if record.problem:
            raise _refusal(record.problem, self._fields)
        if record.format is None or record.format.name != format_name:
            found = record.format.name if record.format else "unknown"
            message = f"The texts of the vote read as the format '{found}', not '{format_name}'; send them as messages."
            raise InvalidRequest(message, param="prompt")


def _refusal(problem: InvalidRow, fields: Mapping[str, str]) -> InvalidRequest:
    """Turns `problem`, an error about a row of training data, into an InvalidRequest that names the request's field to
    correct.

    `fields` maps JSON pointers in the row to the fields of the request from which the values came.
    """
    within = [pointer for pointer in fields if f"{problem.pointer}/".startswith(f"{pointer}/")]
    pointer = max(within, key=len, default="")
    rest = problem.pointer.removeprefix(pointer).replace("/", ".")
    field = f"{fields[pointer]}{rest}" if pointer else rest.removeprefix(".") or None
    what = problem.message.removeprefix(f"Line {problem.line}: ")
    subject = f"the field {problem.pointer} " if problem.pointer else "the row "
    reason = what.removeprefix(subject)
    message = f"{field or 'The vote'} {reason}" if what.startswith(subject) else f"{field or 'The vote'}: {what}"
    return InvalidRequest(message, param=field)

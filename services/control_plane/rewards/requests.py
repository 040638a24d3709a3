"""Defines the JSON body of POST /v1/x/rewards, and turns the rows in this body into groups (prompts with their
completions)."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow
from dpo_core.data.scored_formats import in_request, read_in_request
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.http.validation import Text

MOST_ROWS = 256
MOST_COMPLETIONS = 64  # in one row

_MESSAGE = {"type": "object", "properties": {"role": {"type": "string"}, "content": {"type": "string"}}}
_TEXT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": _MESSAGE}]}


class Row(BaseModel):
    """A prompt and its completions. Pydantic does not check their values, because `dpo_core.data` does."""

    model_config = ConfigDict(extra="forbid")
    prompt: Annotated[Any, WithJsonSchema(_TEXT)]
    completions: Annotated[Any, WithJsonSchema({"type": "array", "items": _TEXT, "maxItems": MOST_COMPLETIONS})]
    system: Annotated[Any, WithJsonSchema({"type": "string"})] = None
    tools: Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "object"}})] = None
    chat_template_kwargs: Annotated[Any, WithJsonSchema({"type": "object"})] = None


class RewardsBody(BaseModel):
    """The JSON body of POST /v1/x/rewards: rows of prompts with completions, and the models that score the
    completions."""

    model_config = ConfigDict(extra="forbid")
    model: Text
    reference: Text | None = None  # None: the reference of the policy's job
    beta: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None  # None: that of the policy's job
    rows: Annotated[list[Row], Field(min_length=1, max_length=MOST_ROWS)]


def groups_of(body: RewardsBody) -> list[Group]:
    """Returns the rows of the body as groups (prompts with their completions).

    Raises InvalidRequest, with the path of the value, for a row that cannot be read.
    """
    try:
        groups = [
            read_in_request(number, row.model_dump(exclude_unset=True)) for number, row in enumerate(body.rows, 1)
        ]
    except InvalidRow as error:
        path, message = in_request(error)
        raise InvalidRequest(message, param=path) from None
    for number, group in enumerate(groups):
        if (count := len(group.completions)) > MOST_COMPLETIONS:
            path = f"rows.{number}.completions"
            message = (
                f"The field '{path}' has {count} completions, but a row can have at most {MOST_COMPLETIONS}; send "
                "the completions in several rows."
            )
            raise InvalidRequest(message, param=path)
    return groups

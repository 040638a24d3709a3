"""The JSON objects of evaluations and their items, as the OpenAPI document describes them.

docs/use/evaluations.md says what the results mean.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


class EvaluationError(TypedDict):
    code: Annotated[str | None, Field(description="Code of the error, as in docs/wire/errors.md.")]
    message: Annotated[str, Field(description="What went wrong, as a sentence.")]
    param: Annotated[str | None, Field(description="The field of the request that is wrong.")]


class ItemError(TypedDict):
    code: Annotated[str | None, Field(description="Code of the error, as in docs/wire/errors.md.")]
    message: Annotated[str, Field(description="What went wrong, as a sentence.")]


class EvaluationDocument(TypedDict):
    id: Annotated[str, Field(description="The id of the evaluation.")]
    object: Annotated[Literal["evaluation"], Field(description="The type of the object.")]
    created_at: Annotated[int, Field(description="When the evaluation was created, in Unix seconds.")]
    kind: Annotated[str, Field(description="The kind of the evaluation, such as compare.")]
    status: Annotated[Status, Field(description="The state of the evaluation.")]
    model: Annotated[str, Field(description="The model that is evaluated.")]
    request: Annotated[dict[str, Any], Field(description="The request, with the values that the service has chosen.")]
    num_items: Annotated[int, Field(description="How many items (prompts or rows) the evaluation has.")]
    num_completed: Annotated[int, Field(description="How many items are finished.")]
    num_failed: Annotated[int, Field(description="How many items failed and are not tried again.")]
    progress: Annotated[float, Field(description="The share of the work that is done, from 0 to 1.")]
    started_at: Annotated[int | None, Field(description="When the work began, in Unix seconds.")]
    estimated_finish: Annotated[
        int | None, Field(description="When the evaluation will probably end, in Unix seconds.")
    ]
    finished_at: Annotated[int | None, Field(description="When the evaluation ended, in Unix seconds.")]
    waits_for: Annotated[str | None, Field(description="Why the evaluation does not go on at the moment.")]
    results: Annotated[
        dict[str, Any] | None, Field(description="The results; null until the evaluation has succeeded.")
    ]
    error: Annotated[EvaluationError | None, Field(description="Why the evaluation failed.")]


class EvaluationItemDocument(TypedDict):
    id: Annotated[str, Field(description="The number of the item, from 0.")]
    object: Annotated[Literal["evaluation.item"], Field(description="The type of the object.")]
    line: Annotated[int, Field(description="The number of the item's row in the file or request, from 1.")]
    status: Annotated[Literal["waiting", "completed", "failed"], Field(description="The state of the item.")]
    prompt: Annotated[Any, Field(description="The prompt: a text, or messages.")]
    found: Annotated[dict[str, Any], Field(description="The answers, verdicts and scores of the item so far.")]
    error: Annotated[ItemError | None, Field(description="Why the item failed.")]

"""The JSON objects of evaluations and their items, as the OpenAPI document describes them.

docs/use/evaluations.md says what the results mean.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class EvaluationError(TypedDict):
    code: Annotated[str | None, Field(description="Code of the error, as in docs/wire/errors.md.")]
    message: Annotated[str, Field(description="What went wrong, as a sentence.")]
    param: Annotated[str | None, Field(description="The field of the request that it is about.")]


class ItemError(TypedDict):
    code: Annotated[str | None, Field(description="Code of the error, as in docs/wire/errors.md.")]
    message: Annotated[str, Field(description="What went wrong, as a sentence.")]


class EvaluationDocument(TypedDict):
    id: Annotated[str, Field(description="The id of the evaluation.")]
    object: Annotated[Literal["evaluation"], Field(description="The type of the object.")]
    created_at: Annotated[int, Field(description="When it was created, in Unix seconds.")]
    kind: Annotated[str, Field(description="What is found out.")]
    status: Annotated[Status, Field(description="The state of the evaluation.")]
    model: Annotated[str, Field(description="The model that is evaluated.")]
    request: Annotated[dict[str, Any], Field(description="The request, with the values that the service has chosen.")]
    num_items: Annotated[int, Field(description="How many prompts or rows it has.")]
    num_completed: Annotated[int, Field(description="How many of them are finished.")]
    num_failed: Annotated[int, Field(description="How many of them failed for good.")]
    progress: Annotated[float, Field(description="The share of the work that is done, from 0 to 1.")]
    started_at: Annotated[int | None, Field(description="When the work began, in Unix seconds.")]
    estimated_finish: Annotated[int | None, Field(description="When it will end at this rate, in Unix seconds.")]
    finished_at: Annotated[int | None, Field(description="When it ended, in Unix seconds.")]
    waits_for: Annotated[str | None, Field(description="Why it does not go on at the moment.")]
    results: Annotated[dict[str, Any] | None, Field(description="What was found out; null until it has succeeded.")]
    error: Annotated[EvaluationError | None, Field(description="Why it failed.")]


class EvaluationItemDocument(TypedDict):
    id: Annotated[str, Field(description="The number of the item, from 0.")]
    object: Annotated[Literal["evaluation.item"], Field(description="The type of the object.")]
    line: Annotated[int, Field(description="The row of the file or of the request, from 1.")]
    status: Annotated[Literal["waiting", "completed", "failed"], Field(description="The state of the item.")]
    prompt: Annotated[Any, Field(description="The prompt: a text, or messages.")]
    found: Annotated[dict[str, Any], Field(description="What was found out so far: answers, verdicts, scores.")]
    error: Annotated[ItemError | None, Field(description="Why the item failed.")]

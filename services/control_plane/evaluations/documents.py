"""The JSON objects of evaluations and of their items (prompts with results), as the OpenAPI document describes them.

docs/use/evaluations.md says what the results mean.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


class EvaluationError(TypedDict):
    code: Annotated[
        str | None,
        Field(description="Code of the error, such as `model_error`. docs/wire/errors.md explains all codes."),
    ]
    message: Annotated[str, Field(description="The error in words: what went wrong.")]
    param: Annotated[
        str | None, Field(description="Name of the field of the request that caused the error; null if no field did.")
    ]


class ItemError(TypedDict):
    code: Annotated[
        str | None,
        Field(description="Code of the error, such as `model_error`. docs/wire/errors.md explains all codes."),
    ]
    message: Annotated[str, Field(description="The error in words: what went wrong.")]


class EvaluationDocument(TypedDict):
    id: Annotated[str, Field(description="The id of the evaluation.")]
    object: Annotated[Literal["evaluation"], Field(description="The type of this JSON object; always the same text.")]
    created_at: Annotated[int, Field(description="When the evaluation was created, in Unix seconds.")]
    kind: Annotated[str, Field(description="The kind of the evaluation, such as compare.")]
    status: Annotated[Status, Field(description="The state of the evaluation.")]
    model: Annotated[str, Field(description="Name of the model that is evaluated.")]
    request: Annotated[
        dict[str, Any],
        Field(
            description="The request that created the evaluation, with the values that the service has chosen for "
            "fields that were not sent."
        ),
    ]
    num_items: Annotated[
        int,
        Field(
            description="Number of items of the evaluation. An item is one row of the data: a prompt, perhaps with "
            "completions."
        ),
    ]
    num_completed: Annotated[int, Field(description="Number of the evaluation's items (prompts) that are finished.")]
    num_failed: Annotated[
        int, Field(description="Number of the evaluation's items (prompts) that failed and are not tried again.")
    ]
    progress: Annotated[float, Field(description="The share of the evaluation's work that is done, from 0 to 1.")]
    started_at: Annotated[
        int | None, Field(description="When the work on the evaluation began, in Unix seconds; null before.")
    ]
    estimated_finish: Annotated[
        int | None,
        Field(
            description="When the evaluation will probably end, in Unix seconds; null if this is not known yet, and "
            "after the end."
        ),
    ]
    finished_at: Annotated[int | None, Field(description="When the evaluation ended, in Unix seconds; null before.")]
    waits_for: Annotated[
        str | None,
        Field(
            description="What the evaluation waits for at the moment, such as a model that is being loaded; null if it "
            "does not wait."
        ),
    ]
    results: Annotated[
        dict[str, Any] | None,
        Field(description="The results of the evaluation, by name; null until the evaluation has succeeded."),
    ]
    error: Annotated[
        EvaluationError | None,
        Field(description="The error with which the evaluation failed; null if it has not failed."),
    ]


class EvaluationItemDocument(TypedDict):
    id: Annotated[str, Field(description="The number of the item within its evaluation, from 0, as text.")]
    object: Annotated[
        Literal["evaluation.item"], Field(description="The type of this JSON object; always the same text.")
    ]
    line: Annotated[
        int,
        Field(
            description="The number of the item's row in the file or the request that the evaluation took its rows "
            "from. The first row is 1."
        ),
    ]
    status: Annotated[
        Literal["waiting", "completed", "failed"],
        Field(description="The state of the item. `waiting` means that the service has not finished the item yet."),
    ]
    prompt: Annotated[Any, Field(description="The prompt of the item: a text, or a list of chat messages.")]
    completions: Annotated[
        list[Any],
        Field(
            description="The completions of the item's row, the best one first; each is a text, or a list of chat "
            "messages. Empty if the row has none. Answers of models stand in `found`."
        ),
    ]
    found: Annotated[
        dict[str, Any],
        Field(
            description="What the evaluation has found for the item so far: answers of models, verdicts of the judge, "
            "and scores."
        ),
    ]
    error: Annotated[
        ItemError | None, Field(description="The error with which the item failed; null if it has not failed.")
    ]

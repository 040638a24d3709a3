"""The JSON objects of rounds, as the OpenAPI document describes them.

docs/use/rounds.md says what they mean.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

Status = Literal["running", "paused", "succeeded", "failed", "cancelled"]
Stage = Literal["samples", "file", "job", "model", "evaluations", "results", "next"]
EndReason = Literal["num_rounds", "not_better", "too_few_rows"]


class RoundsError(TypedDict):
    code: Annotated[str | None, Field(description="Code of the error, as in docs/wire/errors.md.")]
    message: Annotated[str, Field(description="What went wrong, as a sentence.")]
    param: Annotated[str | None, Field(description="The field of the request that is wrong.")]


class Interval(TypedDict):
    value: Annotated[float, Field(description="The estimated value.")]
    low: Annotated[float, Field(description="The lower end of its 95% interval.")]
    high: Annotated[float, Field(description="The upper end of its 95% interval.")]


class RoundDocument(TypedDict):
    number: Annotated[int, Field(description="The number of the round, from 1; 0 is the first policy.")]
    samples: Annotated[str | None, Field(description="Id of the evaluation with the sampled and scored answers.")]
    rows: Annotated[dict[str, int] | None, Field(description="How many rows the answers made, and what was left out.")]
    file: Annotated[str | None, Field(description="Id of the file with the rows.")]
    job: Annotated[str | None, Field(description="Id of the job that trained on the file.")]
    model: Annotated[str | None, Field(description="The policy of the round.")]
    evaluations: Annotated[
        dict[str, str], Field(description="Ids of the evaluations of this policy: `quality` and `drift`.")
    ]
    score: Annotated[Interval | None, Field(description="The mean score of the policy's answers.")]
    win_rate: Annotated[
        Interval | None, Field(description="How often its answers are better than those of the round before.")
    ]
    num_failed: Annotated[int | None, Field(description="How many items of these evaluations failed.")]
    kl: Annotated[Interval | None, Field(description="Its divergence from the first policy, in nats per answer.")]


class RoundsDocument(TypedDict):
    id: Annotated[str, Field(description="The id of the rounds.")]
    object: Annotated[Literal["rounds"], Field(description="The type of the object.")]
    created_at: Annotated[int, Field(description="When the rounds were created, in Unix seconds.")]
    status: Annotated[Status, Field(description="The state of the rounds.")]
    stage: Annotated[Stage | None, Field(description="What the newest round does; null after the end.")]
    request: Annotated[dict[str, Any], Field(description="The request.")]
    rounds: Annotated[list[RoundDocument], Field(description="The first policy, and the rounds so far.")]
    best_round: Annotated[int, Field(description="Number of the round with the best policy so far.")]
    model: Annotated[str, Field(description="The policy of the best round.")]
    waits_for: Annotated[str | None, Field(description="Why the rounds do not go on at the moment.")]
    end_reason: Annotated[EndReason | None, Field(description="Why there are no more rounds, after a success.")]
    finished_at: Annotated[int | None, Field(description="When the rounds ended, in Unix seconds.")]
    error: Annotated[RoundsError | None, Field(description="Why the rounds failed.")]

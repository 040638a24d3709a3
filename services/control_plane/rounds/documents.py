"""The JSON objects of sets of rounds (repeated training of a policy on its own answers), as the OpenAPI document
describes them.

docs/use/rounds.md says what the fields mean.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

Status = Literal["running", "paused", "succeeded", "failed", "cancelled"]
Stage = Literal["samples", "file", "job", "model", "evaluations", "results", "next"]
EndReason = Literal["num_rounds", "not_better", "too_few_rows"]


class RoundsError(TypedDict):
    code: Annotated[
        str | None,
        Field(description="Code of the error, such as `too_few_rows`. docs/wire/errors.md explains all codes."),
    ]
    message: Annotated[str, Field(description="The error in words: what went wrong.")]
    param: Annotated[
        str | None, Field(description="Name of the field of the request that caused the error; null if no field did.")
    ]


class Interval(TypedDict):
    value: Annotated[float, Field(description="The value that is estimated from a sample of prompts.")]
    low: Annotated[float, Field(description="The lower end of the value's 95% confidence interval.")]
    high: Annotated[float, Field(description="The upper end of the value's 95% confidence interval.")]


class RoundDocument(TypedDict):
    number: Annotated[
        int,
        Field(
            description="The number of the round. The first round is 1; 0 stands for the policy before the first round."
        ),
    ]
    samples: Annotated[
        str | None, Field(description="Id of the evaluation that holds the round's sampled answers and their scores.")
    ]
    rows: Annotated[
        dict[str, int] | None,
        Field(
            description="Counts of the round's training data: the rows made of the sampled answers, and the answers "
            "left out, by reason."
        ),
    ]
    file: Annotated[
        str | None, Field(description="Id of the training file that was made of the round's sampled answers.")
    ]
    job: Annotated[str | None, Field(description="Id of the job that trains the round's policy.")]
    model: Annotated[str | None, Field(description="Name of the policy that the round's job trained.")]
    evaluations: Annotated[
        dict[str, str],
        Field(
            description="Ids of the evaluations of the round's policy: `quality` (how good its answers are) and "
            "`drift` (how far it is from the first policy). The first policy, of round 0, has no `drift`, and no "
            "`quality` if the judge compares answers. Empty until the evaluations are created."
        ),
    ]
    score: Annotated[
        Interval | None,
        Field(
            description="The mean score of the answers of the round's policy; null before it is known, and if the "
            "judge compares answers instead of scoring them."
        ),
    ]
    win_rate: Annotated[
        Interval | None,
        Field(
            description="The share of prompts, from 0 to 1, to which the round's policy answers better than the policy "
            "of the round before; a tie counts as half. Null before it is known, and if the judge scores answers "
            "instead of comparing them."
        ),
    ]
    num_failed: Annotated[
        int | None, Field(description="Number of prompts that failed in the evaluations of the round's policy.")
    ]
    kl: Annotated[
        Interval | None,
        Field(
            description="KL divergence of the round's policy from the first policy, in nats per answer; null before it "
            "is known."
        ),
    ]


class RoundsDocument(TypedDict):
    id: Annotated[str, Field(description="The id of the rounds.")]
    object: Annotated[Literal["rounds"], Field(description="The type of this JSON object; always the same text.")]
    created_at: Annotated[int, Field(description="When this set of rounds was created, in Unix seconds.")]
    status: Annotated[Status, Field(description="The state of the rounds.")]
    stage: Annotated[
        Stage | None,
        Field(
            description="What the newest round is doing: `samples` samples and scores answers, `file` makes a training "
            "file of them, `job` trains, `model` waits for the trained policy, `evaluations` evaluates this policy, "
            "`results` stores the results, `next` decides whether another round follows. Null after the end."
        ),
    ]
    request: Annotated[
        dict[str, Any],
        Field(
            description="The request that created the rounds, with the service's defaults for fields that were not "
            "sent."
        ),
    ]
    rounds: Annotated[
        list[RoundDocument],
        Field(
            description="The rounds so far. The first entry, with the number 0, describes the policy before the first "
            "round."
        ),
    ]
    best_round: Annotated[int, Field(description="Number of the round with the best policy so far.")]
    model: Annotated[str, Field(description="Name of the policy of the best round so far.")]
    waits_for: Annotated[
        str | None,
        Field(description="What the rounds wait for at the moment, such as a paused job; null if they do not wait."),
    ]
    end_reason: Annotated[
        EndReason | None,
        Field(
            description="Why no further round follows, if the rounds have succeeded: `num_rounds` (all rounds are "
            "done), `not_better` (the newest policy is not better) or `too_few_rows` (the answers make too few rows "
            "to train on)."
        ),
    ]
    finished_at: Annotated[int | None, Field(description="When the rounds ended, in Unix seconds; null before.")]
    error: Annotated[
        RoundsError | None, Field(description="The error with which the rounds failed; null if they have not failed.")
    ]

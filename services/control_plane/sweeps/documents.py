"""The JSON objects of sweeps, of their trials (jobs with chosen values) and of their reward-KL frontiers, as the
OpenAPI document describes them.

docs/use/sweeps.md says what their fields mean.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

Status = Literal["running", "succeeded", "failed", "cancelled"]
TrialStatus = Literal["training", "evaluating", "succeeded", "failed", "stopped", "cancelled"]


class SweepError(TypedDict):
    code: Annotated[
        str | None,
        Field(description="Code of the error, such as `sweep_stalled`. docs/wire/errors.md explains all codes."),
    ]
    message: Annotated[str, Field(description="The error in words: what went wrong.")]
    param: Annotated[
        str | None, Field(description="Name of the field of the request that caused the error; null if no field did.")
    ]


class TrialDocument(TypedDict):
    id: Annotated[
        str, Field(description="The number of the trial (one job of the sweep) within its sweep, from 0, as text.")
    ]
    object: Annotated[Literal["sweep.trial"], Field(description="The type of this JSON object; always the same text.")]
    created_at: Annotated[int, Field(description="When the trial's job was submitted, in Unix seconds.")]
    status: Annotated[TrialStatus, Field(description="The state of the trial.")]
    parameters: Annotated[
        dict[str, Any],
        Field(
            description="The values that the sweep chose for this trial's job, by field, such as "
            '`{"method.dpo.hyperparameters.beta": 0.1}`.'
        ),
    ]
    job_id: Annotated[str | None, Field(description="Id of the trial's job; null if the service refused the job.")]
    model: Annotated[str | None, Field(description="Name of the policy that the trial's job has trained; null before.")]
    value: Annotated[
        float | None,
        Field(
            description="The trial's value of the metric by which the sweep compares its trials; null if there is none "
            "yet."
        ),
    ]
    evaluations: Annotated[
        dict[str, str],
        Field(description="The ids of the evaluations of the trial's policy, by the names that the sweep gives them."),
    ]
    results: Annotated[
        dict[str, Any],
        Field(
            description="The results of the evaluations of the trial's policy, by the names that the sweep gives the "
            "evaluations."
        ),
    ]
    error: Annotated[
        SweepError | None, Field(description="The error with which the trial failed; null if it has not failed.")
    ]


class SweepDocument(TypedDict):
    id: Annotated[str, Field(description="The id of the sweep.")]
    object: Annotated[Literal["sweep"], Field(description="The type of this JSON object; always the same text.")]
    created_at: Annotated[int, Field(description="When the sweep was created, in Unix seconds.")]
    status: Annotated[Status, Field(description="The state of the sweep.")]
    request: Annotated[
        dict[str, Any],
        Field(
            description="The request that created the sweep, with the values that the service has chosen for fields "
            "that were not sent."
        ),
    ]
    num_trials: Annotated[
        int, Field(description="Number of trials (jobs with chosen values) that the sweep makes in all.")
    ]
    trials: Annotated[
        dict[str, int],
        Field(description='Number of the sweep\'s trials in each state, such as `{"training": 2, "succeeded": 5}`.'),
    ]
    best: Annotated[
        TrialDocument | None,
        Field(description="The trial with the best value of the sweep's metric so far; null if no trial has a value."),
    ]
    waits_for: Annotated[
        str | None,
        Field(
            description="What the sweep waits for at the moment, such as a limit of the project; null if it does not "
            "wait."
        ),
    ]
    finished_at: Annotated[int | None, Field(description="When the sweep ended, in Unix seconds; null before.")]
    error: Annotated[
        SweepError | None, Field(description="The error with which the sweep failed; null if it has not failed.")
    ]


class Estimate(TypedDict):
    value: float
    low: Annotated[float, Field(description="The lower end of the value's 95% confidence interval.")]
    high: Annotated[float, Field(description="The upper end of the value's 95% confidence interval.")]


class FrontierPoint(TypedDict):
    trial: Annotated[str, Field(description="The number of the trial (one job of the sweep), from 0, as text.")]
    job_id: Annotated[str, Field(description="Id of the trial's job.")]
    model: Annotated[str, Field(description="Name of the policy that the trial's job trained.")]
    method: Annotated[str, Field(description="The training objective of the trial's job, such as `dpo`.")]
    parameters: Annotated[
        dict[str, Any],
        Field(
            description="The values that the sweep chose for this trial's job, by field, such as "
            '`{"method.dpo.hyperparameters.beta": 0.1}`.'
        ),
    ]
    kl: Annotated[
        Estimate, Field(description="KL divergence of the policy from its reference model, in nats per answer.")
    ]
    reward: Annotated[
        Estimate,
        Field(
            description="The mean score of the policy's answers, or the policy's win rate against a baseline (from 0 "
            "to 1)."
        ),
    ]
    on_frontier: Annotated[
        bool,
        Field(
            description="Whether this point is on the frontier: no other point with the same or a lower `kl` has at "
            "least the same `reward`."
        ),
    ]


class FrontierDocument(TypedDict):
    object: Annotated[
        Literal["sweep.frontier"], Field(description="The type of this JSON object; always the same text.")
    ]
    sweep_id: Annotated[str, Field(description="The id of the sweep.")]
    kl: Annotated[
        str,
        Field(
            description="Where the field `kl` of each point comes from: an evaluation of the sweep and one of its "
            "results, such as `drift/kl_per_sequence`."
        ),
    ]
    reward: Annotated[
        str,
        Field(
            description="Where the field `reward` of each point comes from: an evaluation of the sweep and one of its "
            "results, such as `quality/score`."
        ),
    ]
    data: Annotated[
        list[FrontierPoint],
        Field(
            description="One point for each trial (job) whose policy has been evaluated, sorted by `kl`, lowest first."
        ),
    ]

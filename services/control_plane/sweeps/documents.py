"""The JSON objects of sweeps, of their trials and of their frontiers, as the OpenAPI document describes them.

docs/use/sweeps.md says what they mean.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

Status = Literal["running", "succeeded", "failed", "cancelled"]
TrialStatus = Literal["training", "evaluating", "succeeded", "failed", "stopped", "cancelled"]


class SweepError(TypedDict):
    code: Annotated[str | None, Field(description="Code of the error, as in docs/wire/errors.md.")]
    message: Annotated[str, Field(description="What went wrong, as a sentence.")]
    param: Annotated[str | None, Field(description="The field of the request that is wrong.")]


class TrialDocument(TypedDict):
    id: Annotated[str, Field(description="The number of the trial, from 0.")]
    object: Annotated[Literal["sweep.trial"], Field(description="The type of the object.")]
    created_at: Annotated[int, Field(description="When the trial's job was submitted, in Unix seconds.")]
    status: Annotated[TrialStatus, Field(description="The state of the trial.")]
    parameters: Annotated[dict[str, Any], Field(description="The chosen values, by the paths of the job's fields.")]
    job_id: Annotated[str | None, Field(description="The trial's job; null if the service refused it.")]
    model: Annotated[str | None, Field(description="The policy that the job has trained.")]
    value: Annotated[float | None, Field(description="The trial's value of the sweep's metric.")]
    evaluations: Annotated[dict[str, str], Field(description="The ids of the trial's evaluations, by their names.")]
    results: Annotated[dict[str, Any], Field(description="The results of these evaluations, by their names.")]
    error: Annotated[SweepError | None, Field(description="Why the trial failed.")]


class SweepDocument(TypedDict):
    id: Annotated[str, Field(description="The id of the sweep.")]
    object: Annotated[Literal["sweep"], Field(description="The type of the object.")]
    created_at: Annotated[int, Field(description="When the sweep was created, in Unix seconds.")]
    status: Annotated[Status, Field(description="The state of the sweep.")]
    request: Annotated[dict[str, Any], Field(description="The request, with the values that the service has chosen.")]
    num_trials: Annotated[int, Field(description="How many trials the sweep makes.")]
    trials: Annotated[dict[str, int], Field(description="How many trials are in each state so far.")]
    best: Annotated[
        TrialDocument | None,
        Field(description="The trial with the best value of the metric."),
    ]
    waits_for: Annotated[str | None, Field(description="Why the sweep does not go on at the moment.")]
    finished_at: Annotated[int | None, Field(description="When the sweep ended, in Unix seconds.")]
    error: Annotated[SweepError | None, Field(description="Why the sweep failed.")]


class Estimate(TypedDict):
    value: float
    low: Annotated[float, Field(description="The lower end of the 95% interval.")]
    high: Annotated[float, Field(description="The upper end of the 95% interval.")]


class FrontierPoint(TypedDict):
    trial: Annotated[str, Field(description="The number of the trial.")]
    job_id: Annotated[str, Field(description="The trial's job.")]
    model: Annotated[str, Field(description="The trial's policy.")]
    method: Annotated[str, Field(description="The method with which the job trained.")]
    parameters: Annotated[dict[str, Any], Field(description="The chosen values, by the paths of the job's fields.")]
    kl: Annotated[Estimate, Field(description="How far the policy has moved from its reference, in nats.")]
    reward: Annotated[Estimate, Field(description="The mean score of the policy's answers, or its win rate.")]
    on_frontier: Annotated[bool, Field(description="Whether no policy with at most this KL has a higher reward.")]


class FrontierDocument(TypedDict):
    object: Annotated[Literal["sweep.frontier"], Field(description="The type of the object.")]
    sweep_id: Annotated[str, Field(description="The id of the sweep.")]
    kl: Annotated[str, Field(description="The evaluation and its result that the field `kl` of a point holds.")]
    reward: Annotated[str, Field(description="The evaluation and its result that the field `reward` of a point holds.")]
    data: Annotated[list[FrontierPoint], Field(description="A point for each evaluated trial, by rising KL.")]

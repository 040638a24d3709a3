"""Builds the JSON objects of sweeps, of their trials (jobs with chosen values) and of their frontiers, which compare
rewards with KL divergences.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from services.control_plane.core.responses import seconds
from services.control_plane.core.tables import Job, Sweep, SweepTrial
from services.control_plane.sweeps import frontier
from services.control_plane.sweeps.frontier import Axes


def sweep_object(row: Sweep, counts: Mapping[str, int], best: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the JSON object of a sweep. `counts` says how many of its trials (jobs with chosen values) are in each
    state, and `best` is the JSON object of the best trial.
    """
    return {
        "id": row.id,
        "object": "sweep",
        "created_at": seconds(row.created_at),
        "status": row.state,
        "request": _without_none(row.spec),
        "num_trials": row.num_trials,
        "trials": dict(counts),
        "best": best,
        "waits_for": row.waits_for,
        "finished_at": seconds(row.finished_at),
        "error": row.error,
    }


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON object without the fields that are null, also in the objects within it. Only the field `job`
    stays as the client sent it.
    """
    shown = {
        name: _without_none(part) if isinstance(part, dict) and name != "job" else part for name, part in value.items()
    }
    return {name: part for name, part in shown.items() if part is not None}


def trial_object(row: SweepTrial, job: Job | None) -> dict[str, Any]:
    return {
        "id": str(row.number),
        "object": "sweep.trial",
        "created_at": seconds(row.created_at),
        "status": row.state,
        "parameters": row.parameters,
        "job_id": row.job_id,
        "model": job.fine_tuned_model if job else None,
        "value": row.value,
        "evaluations": row.evaluations,
        "results": row.results,
        "error": row.error,
    }


def frontier_object(sweep: Sweep, rows: Sequence[tuple[SweepTrial, Job]], axes: Axes) -> dict[str, Any]:
    """Returns the JSON object of a sweep's frontier: a point for each trial (job with chosen values) that has a KL
    divergence and a reward.

    `rows` are pairs of a trial and its job. `axes` names the evaluations and results from which the KL divergence and
    the reward come.
    """
    points = [
        {
            "trial": str(trial.number),
            "job_id": job.id,
            "model": job.fine_tuned_model,
            "method": job.spec["config"]["objective"]["type"],
            "parameters": trial.parameters,
            "kl": trial.results[axes.kl[0]][axes.kl[1]],
            "reward": trial.results[axes.reward[0]][axes.reward[1]],
        }
        for trial, job in rows
        if axes.kl[0] in trial.results and axes.reward[0] in trial.results
    ]
    return {
        "object": "sweep.frontier",
        "sweep_id": sweep.id,
        "kl": "/".join(axes.kl),
        "reward": "/".join(axes.reward),
        "data": frontier.mark(points),
    }

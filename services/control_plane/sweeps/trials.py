"""Makes the trials of a sweep: turns the chosen values into jobs, and trained jobs into evaluations of their policies.

A trial is one job of a sweep, with the values that the sweep chose for it.
"""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core import checkpoint_selection
from services.contract import JobSpec
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.tables import Checkpoint, Job, Sweep, SweepEvaluation
from services.control_plane.evaluations import evaluations
from services.control_plane.evaluations.kinds.judging import grader_of
from services.control_plane.evaluations.requests import CreateEvaluation
from services.control_plane.evaluations.work import kind_of
from services.control_plane.http.validation import parse, within
from services.control_plane.jobs import admission, jobs
from services.control_plane.jobs.combinations import Asked
from services.control_plane.jobs.plans import plans
from services.control_plane.jobs.requests import CreateJob
from services.control_plane.models import models
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from services.control_plane.sweeps.requests import TRAINING_METRICS, CreateSweep
from services.control_plane.sweeps.search import Values
from services.control_plane.sweeps.stopping import Curve, Point


def job_of(sweep: CreateSweep, values: Values) -> tuple[JobSpec, Asked]:
    """Makes the job of a trial. A trial is a job of the sweep; `values` are the values that the sweep chose for it.
    Returns two values:

    - the complete description of the job
    - those options for which the service chooses a value if the request gives none, such as the adapter: the values
      that the sweep's request gives, before the service chooses any

    Raises InvalidRequest, which names the field and the trial's values, if the job is not valid.
    """
    with within("job", f" (This is the trial with {json.dumps(values)}.)"):
        body = parse(CreateJob, body_of(sweep, values), "")
        spec, asked = body.spec(), body.asked()
        _check_metrics(sweep, spec)
    return spec, asked


def body_of(sweep: CreateSweep, values: Values) -> dict[str, Any]:
    """Returns the request body of the job of a trial: the sweep's own body of a job, with `values` put into the fields
    that their keys (paths) name. `values` are the values that the sweep chose for the trial.

    If the method is a parameter, only the options of the trial's own method remain. Raises InvalidRequest for a path
    that leads through a value that is no object.
    """
    body = deepcopy(sweep.job)
    if (kind := values.get("method.type")) is not None:
        options = body.get("method") or {}
        body["method"] = {"type": kind, **({kind: options[kind]} if kind in options else {})}
    for path in sorted(values, key=lambda path: path.count(".")):
        _put(body, path, values[path])
    return body


def _put(body: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    place = body
    for number, name in enumerate(way):
        if name == "*":
            name = str((body.get("method") or {}).get("type", ""))
        step = place.setdefault(name, {})
        if step is None:
            step = place[name] = {}
        if not isinstance(step, dict):
            where = ".".join(way[: number + 1])
            message = f"The parameter '{path}' lies within {where}, which is {step!r:.40} and has no fields."
            raise InvalidRequest(f"{message} Correct the path.", param=where)
        place = step
    place[last] = value


def _check_metrics(sweep: CreateSweep, spec: JobSpec) -> None:
    """Raises InvalidRequest if the sweep compares its jobs by a metric that a job with this spec (description) does not
    measure on validation data.

    The job lacks the metric if it has no validation data, or if its training method does not measure the metric.
    """
    asked = {"metric.name": sweep.metric.name} if sweep.metric and sweep.metric.name in TRAINING_METRICS else {}
    if sweep.early_stop:
        asked["early_stop.metric"] = sweep.early_stop.metric
    for param, name in asked.items():
        if not (spec.validation_file or spec.validation_share):
            message = f"{param} is {name}, but the job has no validation; give it validation_file or validation_share."
            raise InvalidRequest(message, param="validation_file")
        if name not in (known := spec.config.objective.traits.best_metrics):
            what = f"{param} is {name}, which the method '{spec.config.objective.type}' does not measure"
            raise InvalidRequest(f"{what}; it measures {', '.join(known)}.", param="method.type")


async def check(session: AsyncSession, settings: Settings, ray_api: RayApi, sweep: CreateSweep, values: Values) -> None:
    """Checks the job that the sweep would submit for one trial (one choice of values). Raises an ApiError if the
    service would refuse the job.

    `values` holds the trial's value of each parameter of the sweep.
    """
    spec, asked = job_of(sweep, values)
    with within("job", f" (This is the trial with {json.dumps(values)}.)"):
        admitted = await admission.admit(session, settings, spec, asked)
        await plans.refuse_hopeless(admitted.spec, admitted.model, settings, ray_api)


async def submit(
    session: AsyncSession, settings: Settings, ray_api: RayApi, sweep: CreateSweep, values: Values, key_id: str
) -> Job:
    """Submits the job of one trial (one choice of values), and returns the job. Raises an ApiError if the service
    refuses the job.

    `values` holds the trial's value of each parameter of the sweep. `key_id` is the id of the API key that created the
    sweep.
    """
    spec, asked = job_of(sweep, values)
    admitted = await admission.admit(session, settings, spec, asked)
    await plans.refuse_hopeless(admitted.spec, admitted.model, settings, ray_api)
    return await jobs.submit(session, *admitted[:3], key_id, settings, are_checked=admitted.are_checked)


# --- evaluations of trained jobs --------------------------------------------------------------


async def check_metric(
    session: AsyncSession, settings: Settings, sweep: CreateSweep, bodies: Mapping[str, CreateEvaluation]
) -> None:
    """Raises InvalidRequest if the sweep compares its jobs by a score of sampled answers, but the judge of these
    answers gives no scores and only compares answers. `bodies` are the sweep's evaluations by name."""
    body = bodies.get(sweep.metric.name.partition("/")[0]) if sweep.metric else None
    if body is None or body.kind != "samples" or body.judge is None or body.judge.type != "model":
        return
    if (await grader_of(session, settings, body.judge, of=body.model)).is_asked:
        message = (
            f"The judge '{body.judge.model}' only compares answers, so the samples have no score; take a reward model "
            "or a rule, or another metric."
        )
        raise InvalidRequest(message, param="metric.name")


async def evaluate(
    session: AsyncSession, settings: Settings, sweep: Sweep, kept: Sequence[SweepEvaluation], model: str
) -> dict[str, str]:
    """Creates the sweep's evaluations of the policy `model`. Returns their ids, by the names of the evaluations in the
    sweep.

    `kept` are the descriptions of the evaluations that the sweep stores, with their rows. Raises an ApiError if one of
    the evaluations is refused.
    """
    found = {}
    for each in kept:
        body = CreateEvaluation.model_validate({**each.spec, "model": model}, extra="ignore")
        kind = await kind_of(session, settings, body)
        spec = body.spec(**kind.resolved)
        await models.hold(session, settings, spec.models)
        evaluation = await evaluations.create(session, spec, each.rows["rows"], kind.num_stages, sweep.key_id)
        found[each.name] = evaluation.id
    return found


# --- values of metrics ------------------------------------------------------------------------


async def curves(session: AsyncSession, job_ids: Sequence[str], metric: str) -> dict[str, Curve]:
    """Returns the curve of a metric for each job, by the job's id. A curve has a point for each checkpoint of the job
    so far: the metric's value on validation data, and the share of the job's steps (from 0 to 1) after which it was
    measured.
    """
    query = select(Checkpoint.job_id, Checkpoint.step, Checkpoint.metrics, Job.training, Job.spec)
    query = query.join(Job, Job.id == Checkpoint.job_id).where(Checkpoint.job_id.in_(job_ids))
    found: dict[str, list[Point]] = {}
    for row in await session.execute(query.order_by(Checkpoint.step)):
        total = (row.training or {}).get("total_steps")
        if total and (value := row.metrics.get(metric)) is not None:
            found.setdefault(row.job_id, []).append(Point(row.step / total, value))
    return dict(found)


async def value_of_policy(session: AsyncSession, job: Job, metric: str) -> float | None:
    """Returns the value of a metric of validation at the checkpoint that became the policy of the job.

    Returns None if this checkpoint was not evaluated.
    """
    spec = JobSpec.model_validate(job.spec)
    query = select(Checkpoint.step, Checkpoint.metrics).where(Checkpoint.job_id == job.id).order_by(Checkpoint.step)
    rows = {row.step: row.metrics for row in await session.execute(query)}
    evaluated = checkpoint_selection.evaluations(rows.items(), spec.config.best_metric)
    top = checkpoint_selection.best(evaluated, spec.config.best_metric) if spec.policy == "best" else None
    step = top.step if top else max(rows, default=0)
    value: float | None = rows.get(step, {}).get(metric)
    return value

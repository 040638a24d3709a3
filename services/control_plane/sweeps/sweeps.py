"""Creates sweeps, and makes all changes of sweeps and of their trials.

A trial is one job of a sweep. The state of a trial is first `training`, then `evaluating`, and at the end `succeeded`,
`failed`, `stopped` (early, because the trial was hopeless) or `cancelled`. Every step of a sweep is one transaction
that holds the lock of the sweep's row: the new job, its trial and the sweep's state change together. So if a control
plane dies, no trial is lost, and none is submitted twice.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import and_, delete, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.options import LOSS
from services.contract import storable
from services.control_plane.core.errors import ApiError, Forbidden, InvalidRequest, NotFound, OverQuota
from services.control_plane.core.leases import next_in_turn, take
from services.control_plane.core.store import append, now, project_of
from services.control_plane.core.tables import (
    EVALUATION_ENDS,
    TERMINAL,
    TRIAL_ENDS,
    Evaluation,
    Job,
    Sweep,
    SweepEvaluation,
    SweepTrial,
)
from services.control_plane.evaluations import evaluations
from services.control_plane.evaluations.requests import CreateEvaluation
from services.control_plane.jobs import jobs
from services.control_plane.jobs.plans.plans import DOES_NOT_FIT, MISFIT_AFTER, misfits_for_too_long
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from services.control_plane.sweeps import trials
from services.control_plane.sweeps.requests import TRAINING_METRICS, CreateSweep
from services.control_plane.sweeps.search import Tried, suggest
from services.control_plane.sweeps.stopping import is_hopeless
from services.control_plane.tenants import projects

MOST_LIVE = 20  # the most sweeps of a project that have not ended
LEASE = "sweep "  # the name of a sweep's lease is this text and the sweep's id
LIVE = text("state = 'running'")  # as in the index
CLAIMS = func.pg_try_advisory_xact_lock(func.hashtextextended("claims of sweeps", 0))


# --- requests --------------------------------------------------------------------------------


async def create(
    session: AsyncSession,
    request: CreateSweep,
    bodies: Mapping[str, CreateEvaluation],
    rows: Mapping[str, Sequence[dict[str, Any]]],
    key_id: str,
) -> Sweep:
    """Adds the row of a new sweep to the database, and returns the row. The service submits the sweep's jobs in the
    background.

    `bodies` are the sweep's evaluations, and `rows` the prompts of these evaluations, both by the evaluations' names.
    `key_id` is the id of the API key that creates the jobs and evaluations. Raises OverQuota if the project has too
    many sweeps that have not ended, and Forbidden if the project is archived.
    """
    project = await projects.lock(session, project_of(session))  # so that simultaneous requests are counted
    if project.archived_at is not None:
        message = f"The project {project.id} of your key is archived; use a key of another project."
        raise Forbidden(message, code="project_archived")
    live = await session.scalar(select(func.count()).select_from(Sweep).where(LIVE)) or 0
    if live >= MOST_LIVE:
        message = (
            f"The project has {live} sweeps that have not ended, and may have {MOST_LIVE}; "
            "wait until one ends, or cancel one."
        )
        raise OverQuota(message)
    specs = {
        name: body.model_dump(mode="json", exclude={"rows", "model"}, exclude_none=True)
        for name, body in bodies.items()
    }
    sweep = Sweep(
        id=f"sweep-{secrets.token_hex(12)}",
        created_at=await now(session),
        key_id=key_id,
        spec=request.model_dump(mode="json") | {"evaluations": specs},
        num_trials=request.num_trials,
    )
    session.add(sweep)
    await session.flush()
    session.add_all(
        SweepEvaluation(sweep_id=sweep.id, number=number, name=name, spec=spec, rows={"rows": list(rows[name])})
        for number, (name, spec) in enumerate(specs.items())
    )
    await session.flush()
    return sweep


async def find(session: AsyncSession, sweep_id: str) -> Sweep:
    row = await session.get(Sweep, sweep_id, populate_existing=True)
    if row is None:
        message = f"There is no sweep '{sweep_id}'; list the project's sweeps for their ids."
        raise NotFound(message, param="sweep_id", code="sweep_not_found")
    return row


async def lock(session: AsyncSession, sweep_id: str) -> Sweep:
    """Locks the sweep's row until the transaction ends, so that nobody else can change the sweep. Returns the row."""
    await find(session, sweep_id)
    return await session.get_one(Sweep, sweep_id, with_for_update=True, populate_existing=True)


async def cancel(session: AsyncSession, sweep_id: str, actor: str) -> Sweep:
    """Ends the sweep as cancelled, and cancels its jobs and evaluations that have not ended. Returns the sweep.

    Policies and results so far are kept. `actor` is the id of the API key that sent the request. Raises InvalidRequest
    if the sweep has ended.
    """
    sweep = await lock(session, sweep_id)
    if sweep.state != "running":
        raise InvalidRequest(f"The sweep {sweep_id} has ended ({sweep.state}); it cannot be cancelled.")
    await _stop(session, sweep, actor)
    await _end(session, sweep, "cancelled")
    return sweep


async def _stop(session: AsyncSession, sweep: Sweep, actor: str) -> None:
    """Marks the trials of the sweep that have not ended as cancelled, and cancels their jobs and evaluations. A trial
    is one job of the sweep with its evaluations. `actor` is the id of the API key that the jobs' histories name as the
    sender of the cancellations."""
    state = await _state_of(session, sweep)
    for trial in state.trials:
        if trial.state in TRIAL_ENDS:
            continue
        with suppress(InvalidRequest):  # it has just ended
            if (job := state.job_of(trial)) and job.observed not in TERMINAL:
                await jobs.cancel(session, job.id, actor)
        for evaluation in state.evaluations_of(trial):
            with suppress(InvalidRequest):
                if evaluation.state not in EVALUATION_ENDS:
                    await evaluations.cancel(session, evaluation.id)
        trial.state = "cancelled"


async def remove(session: AsyncSession, sweep_id: str) -> None:
    """Deletes the sweep, with the records of its trials (jobs with chosen values). The jobs, models and evaluations
    themselves stay.

    Raises InvalidRequest if the sweep has not ended.
    """
    sweep = await lock(session, sweep_id)
    if sweep.state == "running":
        raise InvalidRequest(f"The sweep {sweep_id} is running; cancel it before you delete it.")
    for part in (SweepTrial, SweepEvaluation):
        await session.execute(delete(part).where(part.sweep_id == sweep_id))
    await session.delete(sweep)


# --- the background --------------------------------------------------------------------------


@dataclass
class State:
    """The state of a sweep as the database holds it now: the sweep, its trials (jobs with chosen values), and the jobs
    and evaluations of these trials by id.
    """

    sweep: Sweep
    trials: list[SweepTrial]
    jobs: dict[str, Job]
    evaluations: dict[str, Evaluation]

    @cached_property
    def request(self) -> CreateSweep:
        return CreateSweep.model_validate(self.sweep.spec, extra="ignore")

    def job_of(self, trial: SweepTrial) -> Job | None:
        return self.jobs.get(trial.job_id) if trial.job_id else None

    def evaluations_of(self, trial: SweepTrial) -> list[Evaluation]:
        """Returns those evaluations of the trial (job of the sweep) that still exist."""
        return [self.evaluations[each] for each in trial.evaluations.values() if each in self.evaluations]

    @property
    def num_busy(self) -> int:
        """Returns how many jobs of the sweep have not ended."""
        return sum(job.observed not in TERMINAL for job in self.jobs.values())


async def _state_of(session: AsyncSession, sweep: Sweep) -> State:
    query = select(SweepTrial).where(SweepTrial.sweep_id == sweep.id).order_by(SweepTrial.number)
    found = list(await session.scalars(query.execution_options(populate_existing=True)))
    job_ids = [trial.job_id for trial in found if trial.job_id]
    evaluation_ids = [each for trial in found if trial.state == "evaluating" for each in trial.evaluations.values()]
    rows = await session.scalars(select(Job).where(Job.id.in_(job_ids)).execution_options(populate_existing=True))
    query_of = select(Evaluation).where(Evaluation.id.in_(evaluation_ids)).execution_options(populate_existing=True)
    return State(
        sweep,
        found,
        {job.id: job for job in rows},
        {row.id: row for row in await session.scalars(query_of)},
    )


async def advance(session: AsyncSession, sweep_id: str, settings: Settings, ray_api: RayApi) -> Sweep | None:
    """Does what can be done for the sweep now: evaluates the policies of jobs that have ended, ends trials (jobs with
    their evaluations), stops hopeless trials, and submits new jobs. Returns the sweep.

    Does nothing, and returns None, if another control plane is working on the sweep at the moment, or the sweep has
    ended.
    """
    query = select(Sweep).where(Sweep.id == sweep_id, LIVE).with_for_update(skip_locked=True)
    sweep = await session.scalar(query.execution_options(populate_existing=True))
    if sweep is None:
        return None
    state, sweep.waits_for, sweep.troubled_at = await _state_of(session, sweep), None, None
    await _stop_hopeless(session, state)  # locks jobs, which every transaction locks before the project
    for trial in state.trials:
        if trial.state == "training":
            await _end_training(session, state, trial, settings)
        elif trial.state == "evaluating":
            await _end_evaluating(session, state, trial)
    await _submit_next(session, state, settings, ray_api)
    if len(state.trials) == sweep.num_trials and all(trial.state in TRIAL_ENDS for trial in state.trials):
        await _conclude(session, state)
    return sweep


async def _end_training(session: AsyncSession, state: State, trial: SweepTrial, settings: Settings) -> None:
    """Does what follows when the trial's job has ended; a trial is one job of the sweep with its evaluations. If the
    job succeeded, creates the evaluations of its policy; if the sweep has no evaluations, the trial ends as succeeded.
    If the job failed or was cancelled, the trial ends in the same state.

    Also stores the trial's value of the sweep's metric, if the metric is one that jobs measure on validation data.
    """
    job, metric = state.job_of(trial), state.request.metric
    assert job is not None
    if job.observed in ("failed", "cancelled"):
        trial.state, trial.error = job.observed, job.error
    if job.observed != "succeeded":
        return
    assert job.fine_tuned_model is not None
    query = select(SweepEvaluation).where(SweepEvaluation.sweep_id == state.sweep.id).order_by(SweepEvaluation.number)
    try:
        await evaluations.check_room(session, len(state.request.evaluations))
        kept = await session.scalars(query)
        async with session.begin_nested():
            trial.evaluations = await trials.evaluate(session, settings, state.sweep, list(kept), job.fine_tuned_model)
    except OverQuota as error:
        state.sweep.waits_for = error.message
        return
    except ApiError as error:
        _fail(trial, error)
        return
    if metric and metric.name in TRAINING_METRICS:
        trial.value = await trials.value_of_policy(session, job, metric.name)
    trial.state = "evaluating" if trial.evaluations else "succeeded"


async def _end_evaluating(session: AsyncSession, state: State, trial: SweepTrial) -> None:
    """Stores the results of the trial's evaluations and ends the trial (a job of the sweep with its evaluations). Does
    nothing until all these evaluations have ended.
    """
    found = {name: state.evaluations.get(each) for name, each in trial.evaluations.items()}
    trial.results = {
        name: each.results | {"num_failed": each.num_failed}
        for name, each in found.items()
        if each is not None and each.results
    }
    if any(each is not None and each.state not in EVALUATION_ENDS for each in found.values()):
        return
    for name, each in found.items():
        try:
            if each is not None and name in trial.results:
                await evaluations.refuse_incomplete(session, each)
        except ApiError as error:
            trial.results = {other: results for other, results in trial.results.items() if other != name}
            _fail(trial, error)
            return
    if bad := [name for name in found if name not in trial.results]:
        each = found[bad[0]]
        why = (each.error or {}).get("message") if each else "it was deleted."
        message = f"The evaluation '{bad[0]}' gave no results: {why or 'it was cancelled.'}"
        _fail(trial, ApiError(message, code="evaluation_failed"))
        return
    trial.state, metric = "succeeded", state.request.metric
    if metric and metric.name not in TRAINING_METRICS:
        name, _, result = metric.name.partition("/")
        value = trial.results[name].get(result)
        trial.value = value["value"] if isinstance(value, dict) else value


def _fail(trial: SweepTrial, error: ApiError) -> None:
    trial.state = "failed"
    trial.error = {"code": error.code, "message": storable(error.message), "param": error.param}


async def _stop_hopeless(session: AsyncSession, state: State) -> None:
    """Cancels the jobs of those trials (jobs of the sweep) that do worse than the others, by the rules in the sweep's
    field `early_stop`. Does nothing if the sweep has no such field.
    """
    rule = state.request.early_stop
    if rule is None:
        return
    running = {
        job.id: trial
        for trial in state.trials
        if trial.state == "training" and (job := state.job_of(trial)) and job.observed not in TERMINAL
    }
    trained = [job.id for job in state.jobs.values() if job.observed == "succeeded"]
    curves = await trials.curves(session, [*running, *trained], rule.metric)
    others = [curves[each] for each in trained if each in curves]
    for job_id, trial in running.items():
        if is_hopeless(
            curves.get(job_id, ()),
            others,
            "minimize" if rule.metric == LOSS else "maximize",
            min_trials=rule.min_trials,
            min_progress=rule.min_progress,
        ):
            with suppress(InvalidRequest):  # it has just ended; the next look sees how
                await jobs.cancel(session, job_id, state.sweep.key_id)
                trial.state, trial.value = "stopped", None


async def _submit_next(session: AsyncSession, state: State, settings: Settings, ray_api: RayApi) -> None:
    """Submits the jobs of the next trials (jobs with chosen values), until `max_running_jobs` jobs of the sweep are
    queued or running. `state` is the state of the sweep in the database.

    If the service refuses the job of a trial, the trial fails. If the project may not queue another job now, the sweep
    waits. If the job fits no machine that is there now, the sweep waits for at most a week, and then the trial fails.
    """
    num_busy, sweep = state.num_busy, state.sweep
    while num_busy < state.request.max_running_jobs and len(state.trials) < sweep.num_trials:
        number = len(state.trials)
        tried = [
            Tried(each.parameters, each.value) for each in state.trials if each.state not in ("failed", "cancelled")
        ]
        values = await asyncio.to_thread(suggest, state.request, number, tried)
        trial = SweepTrial(
            sweep_id=sweep.id, number=number, parameters=values, state="training", evaluations={}, results={}
        )
        try:
            job = await trials.submit(session, settings, ray_api, state.request, trial.parameters, sweep.key_id)
        except ApiError as error:
            is_misfit = error.code == DOES_NOT_FIT
            if not is_misfit:
                sweep.misfit_since = None
            if isinstance(error, OverQuota) or (is_misfit and not await misfits_for_too_long(session, sweep)):
                limit = f" After {MISFIT_AFTER.days} days of this, the trial fails." if is_misfit else ""
                sweep.waits_for = error.message + limit
                return
            _fail(trial, error)
        else:
            sweep.misfit_since = None
            trial.job_id = job.id
            num_busy += 1
        append(session, trial)
        state.trials.append(trial)


async def _conclude(session: AsyncSession, state: State) -> None:
    """Ends the sweep: as succeeded if one of its trials (jobs) has succeeded, else as failed with the error of the
    first failed trial.
    """
    if any(trial.state == "succeeded" for trial in state.trials):
        await _end(session, state.sweep, "succeeded")
        return
    first = next((trial.error["message"] for trial in state.trials if trial.error), "all were cancelled.")
    await fail(session, state.sweep, ApiError(f"No trial succeeded. The first reason: {first}", code="sweep_failed"))


async def fail(session: AsyncSession, sweep: Sweep, error: ApiError) -> None:
    """Ends the sweep as failed with this error, and cancels its jobs and evaluations that are under way. The caller
    must hold the lock of the sweep's row.
    """
    await _stop(session, sweep, sweep.key_id)
    await _end(session, sweep, "failed", {"code": error.code, "message": storable(error.message), "param": error.param})


async def _end(session: AsyncSession, sweep: Sweep, state: str, error: dict[str, Any] | None = None) -> None:
    await session.execute(delete(SweepEvaluation).where(SweepEvaluation.sweep_id == sweep.id))
    at = await now(session)
    sweep.state, sweep.error, sweep.waits_for, sweep.finished_at = state, error, None, at
    await session.flush()


async def claim(session: AsyncSession, holder: str) -> Sweep | None:
    """Takes the lease of the next running sweep (the right to work on it) for the control plane `holder`. Returns the
    sweep. Returns None if another control plane has the leases of all running sweeps, or is taking one at the moment.

    Projects take turns.
    """
    if not await session.scalar(select(CLAIMS)):
        return None
    row: Sweep | None = await session.scalar(next_in_turn(Sweep, and_(LIVE), LEASE))
    return row if row is not None and await take(session, lease_of(row), holder) else None


def lease_of(sweep: Sweep) -> str:
    return f"{LEASE}{sweep.id}"


async def is_running(session: AsyncSession, sweep: Sweep) -> bool:
    return await session.scalar(select(Sweep.state).where(Sweep.id == sweep.id)) == "running"

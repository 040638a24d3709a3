"""Creates the evaluations that jobs ask for, follows them to their ends, and lists them.

A row of the table `job_evaluations` stands for one evaluation of one model of a job: a checkpoint, or the policy. The
row's state is first `waiting`, then `evaluating`, and at the end `succeeded`, `failed` or `cancelled`. While the row is
waiting or evaluating, the model is not deleted.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import func, literal, or_, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.contract import storable
from services.control_plane.core.errors import ApiError, OverQuota
from services.control_plane.core.leases import lasts_too_long, next_in_turn, take, told
from services.control_plane.core.tables import EVALUATION_ENDS, Evaluation, Job, JobEvaluation, Transition
from services.control_plane.evaluations import evaluations
from services.control_plane.evaluations.of_jobs import body_of
from services.control_plane.evaluations.work import kind_of
from services.control_plane.jobs import checkpoints, jobs
from services.control_plane.models import models
from services.control_plane.settings import Settings

MOST_SHOWN = 100  # the most evaluations that the JSON object of a job lists
REFUSED_FOR = timedelta(days=7)  # how long an evaluation is tried again that the project's limits do not allow
LEASE = "job evaluation "  # the name of the lease of a row is this text and the row's id
LIVE = text("state IN ('waiting', 'evaluating')")  # as in the index
CLAIMS = func.pg_try_advisory_xact_lock(func.hashtextextended("claims of job evaluations", 0))


async def plan(session: AsyncSession, job: Job, model_id: str, of: Literal["policy", "checkpoints"]) -> None:
    """Stores that the model `model_id`, a new checkpoint or the policy of the job, is to be evaluated, as the job asks.
    `of` says which of the two the model is.

    Planning an evaluation twice is harmless.
    """
    values = [
        {"id": f"{model_id} {name}", "project_id": job.project_id, "job_id": job.id, "name": name, "model_id": model_id}
        for name, evaluation in job.spec.get("evaluations", {}).items()
        if evaluation["of"] == of
    ]
    if values:
        await session.execute(insert(JobEvaluation).values(values).on_conflict_do_nothing())


# --- the background --------------------------------------------------------------------------


async def claim(session: AsyncSession, holder: str) -> JobEvaluation | None:
    """Takes the lease (the right of one control plane to work on it) of the next row with something to do, for the
    control plane `holder`. Returns the row, or None if there is none.

    There is something to do if the evaluation is not created yet, if it has ended, or if the job was cancelled.
    """
    if not await session.scalar(select(CLAIMS)):
        return None
    of_evaluation, of_job = Evaluation.__table__.c, Job.__table__.c
    running = select(of_evaluation.id).where(
        of_evaluation.id == JobEvaluation.evaluation_id, of_evaluation.finished_at.is_(None)
    )
    cancelled = select(of_job.id).where(of_job.id == JobEvaluation.job_id, of_job.observed == "cancelled")
    due = or_(JobEvaluation.state == "waiting", ~running.exists(), cancelled.exists())
    row: JobEvaluation | None = await session.scalar(next_in_turn(JobEvaluation, LIVE & due, LEASE))
    return row if row is not None and await take(session, lease_of(row), holder) else None


def lease_of(row: JobEvaluation) -> str:
    return f"{LEASE}{row.id}"


async def is_live(session: AsyncSession, row: JobEvaluation) -> bool:
    state = await session.scalar(select(JobEvaluation.state).where(JobEvaluation.id == row.id))
    return state not in EVALUATION_ENDS


async def lock(session: AsyncSession, row_id: str) -> tuple[Job, JobEvaluation]:
    """Locks the row with this id, and before it the row of its job, until the transaction ends. Returns both.

    Locks the job because events are written for it.
    """
    row = await session.get_one(JobEvaluation, row_id)
    job = await session.get_one(Job, row.job_id, with_for_update=True, populate_existing=True)
    return job, await session.get_one(JobEvaluation, row_id, with_for_update=True, populate_existing=True)


async def advance(
    session: AsyncSession, settings: Settings, row_id: str, rows: Sequence[dict[str, Any]]
) -> JobEvaluation:
    """Takes the next step for one evaluation that a job asked for: creates it, or notes how it has ended. Cancels the
    evaluation of a job that was cancelled. Returns the evaluation's row in the table job_evaluations.

    `row_id` is the id of this row. `rows` are the prompts on which the evaluation is made.
    """
    job, row = await lock(session, row_id)
    row.troubled_at = None
    if row.state in EVALUATION_ENDS:
        return row
    if job.observed == "cancelled":
        await _cancel(session, row)
        await _end(session, job, row, "cancelled", f"{_named(row)} was cancelled with the job")
    elif row.state == "waiting":
        await _create(session, settings, job, row, rows)
    else:
        await _conclude(session, job, row)
    return row


async def _create(
    session: AsyncSession, settings: Settings, job: Job, row: JobEvaluation, rows: Sequence[dict[str, Any]]
) -> None:
    body = body_of(job.spec["evaluations"][row.name], row.model_id)
    submitted = select(Transition.actor).where(Transition.job_id == job.id).order_by(Transition.version).limit(1)
    key_id = await session.scalar(submitted)
    assert key_id is not None
    try:
        async with session.begin_nested():
            kind = await kind_of(session, settings, body)
            spec = body.spec(**kind.resolved)
            await models.hold(session, settings, spec.models)
            evaluation = await evaluations.create(session, spec, rows, kind.num_stages, key_id)
    except OverQuota as error:
        age = await session.scalar(select(func.clock_timestamp() - literal(row.created_at)))
        if age is not None and age > REFUSED_FOR:
            await _fail(session, job, row, error)
        elif row.waits_for != error.message:
            row.waits_for = storable(error.message)
            limit = f"After {REFUSED_FOR.days} days of this, it is given up."
            jobs.tell(session, job.id, f"{_named(row)} waits: {error.message} {limit}")
        return
    except ApiError as error:
        await _fail(session, job, row, error)
        return
    row.state, row.evaluation_id, row.waits_for = "evaluating", evaluation.id, None
    jobs.tell(session, job.id, f"{_named(row)} created: {evaluation.id}", data=_told(row))


async def cancel_all(session: AsyncSession, job_id: str) -> None:
    """Cancels the evaluations of the job that have not ended. The caller must hold the lock of the job's row."""
    live = select(JobEvaluation).where(JobEvaluation.job_id == job_id, LIVE).order_by(JobEvaluation.id)
    for row in await session.scalars(live.with_for_update().execution_options(populate_existing=True)):
        await _cancel(session, row)


async def _cancel(session: AsyncSession, row: JobEvaluation) -> None:
    if row.evaluation_id is not None:
        with suppress(ApiError):  # it has ended, or was deleted
            await evaluations.cancel(session, row.evaluation_id)
    row.state, row.waits_for = "cancelled", None
    await session.flush()


async def _conclude(session: AsyncSession, job: Job, row: JobEvaluation) -> None:
    """Notes how the evaluation of the row has ended, if it has, and tells of its results in an event of the job."""
    evaluation = await session.get(Evaluation, row.evaluation_id, populate_existing=True)
    if evaluation is not None and evaluation.state not in EVALUATION_ENDS:
        return
    if evaluation is None:
        await _end(session, job, row, "cancelled", f"{_named(row)} was deleted: {row.evaluation_id}", level="warn")
        return
    row.error = evaluation.error
    why = f": {evaluation.error['message']}" if evaluation.error else ""
    message = f"{_named(row)} {evaluation.state}{why}"
    level = "info" if evaluation.state == "succeeded" else "warn"
    await _end(session, job, row, evaluation.state, message, level=level, results=evaluation.results)


async def refuse(session: AsyncSession, row_id: str, error: ApiError) -> None:
    """Ends the row with this id as failed, because its evaluation cannot be created, unless the row has ended."""
    job, row = await lock(session, row_id)
    if row.state not in EVALUATION_ENDS:
        await _fail(session, job, row, error)


async def interrupt(session: AsyncSession, row_id: str, error: Exception) -> None:
    """Stores for the user that the row with this id waits after an unexpected error. If these errors go on for a day,
    ends the row as failed.
    """
    job, row = await lock(session, row_id)
    if row.state not in EVALUATION_ENDS and await lasts_too_long(session, row, error):
        await _fail(session, job, row, ApiError(f"{told(error)}; ask the operator.", code="evaluation_stalled"))


async def _fail(session: AsyncSession, job: Job, row: JobEvaluation, error: ApiError) -> None:
    row.error = {"code": error.code, "message": storable(error.message), "param": error.param}
    await _end(session, job, row, "failed", f"{_named(row)} cannot be created: {error.message}", level="warn")


async def _end(
    session: AsyncSession, job: Job, row: JobEvaluation, state: str, message: str, *, level: str = "info", **more: Any
) -> None:
    row.state, row.waits_for = state, None
    jobs.tell(session, job.id, storable(message), level=level, data=_told(row) | more)
    await session.flush()
    await checkpoints.drop_old(session, job)  # the checkpoint may have stayed only for this evaluation


def _named(row: JobEvaluation) -> str:
    return f"Evaluation '{row.name}' of {row.model_id}"


def _told(row: JobEvaluation) -> dict[str, Any]:
    return {"evaluation": row.evaluation_id, "name": row.name, "model": row.model_id}


# --- for clients -----------------------------------------------------------------------------


async def of_jobs(session: AsyncSession, rows: Iterable[Job]) -> dict[str, list[dict[str, Any]]]:
    """Returns the newest MOST_SHOWN evaluations that each of these jobs has asked for, newest first, as JSON objects.
    They are by the ids of the jobs; a job without evaluations is left out.
    """
    asking = [job.id for job in rows if job.spec.get("evaluations")]
    if not asking:
        return {}
    order = (JobEvaluation.created_at.desc(), JobEvaluation.id)
    place = func.row_number().over(partition_by=JobEvaluation.job_id, order_by=order).label("place")
    newest = select(JobEvaluation.id, place).where(JobEvaluation.job_id.in_(asking)).subquery()
    query = select(JobEvaluation, Evaluation.state).join(newest, newest.c.id == JobEvaluation.id)
    query = query.outerjoin(Evaluation, Evaluation.id == JobEvaluation.evaluation_id)
    found: dict[str, list[dict[str, Any]]] = {}
    for row, state in await session.execute(query.where(newest.c.place <= MOST_SHOWN).order_by(*order)):
        shown = {
            "id": row.evaluation_id,
            "name": row.name,
            "model": row.model_id,
            "status": state or ("cancelled" if row.state == "evaluating" else row.state),
            "waits_for": row.waits_for,
            "error": row.error,
        }
        found.setdefault(row.job_id, []).append(shown)
    return found

"""Creates, updates and ends attempts, and records their reports. No other module records reports.

An attempt is one run of a job on the Ray cluster. The attempt's training process sends reports, such as metrics and new
checkpoints.
"""

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, assert_never

from sqlalchemy import func, literal, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from services import storage, tracing
from services.contract import (
    Alive,
    CheckpointSaved,
    Died,
    Failed,
    JobEvent,
    Message,
    Paused,
    Progress,
    ReferenceReleased,
    ReferenceWanted,
    Started,
    StepMetrics,
    Succeeded,
    storable,
)
from services.control_plane.auth.keys import digest
from services.control_plane.core import telemetry
from services.control_plane.core.errors import ApiError, Fenced, InvalidRequest
from services.control_plane.core.store import refuses_value
from services.control_plane.core.tables import Attempt, Checkpoint, Event, Job
from services.control_plane.jobs import checkpoints, jobs
from services.control_plane.jobs.checkpoint_evaluations import checkpoint_evaluations
from services.control_plane.jobs.events.events import is_packed, step_event_id, step_message
from services.control_plane.models import models
from services.control_plane.models.deployments import deployments
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings
from services.control_plane.tenants import quotas

BESIDE_ENCODING = ("waiting for workers", "loading policy", "training")  # stages while later rows may still be encoded


async def begin(
    session: AsyncSession, job_id: str, number: int, reference: str | None, *, num_accelerators: float
) -> Attempt:
    """Adds the row of a new attempt (one run of a job on Ray) to the database, and returns the row. Clears the job's
    column `waits_for`, the reason why the job does not run at the moment.

    `number` is the attempt's number within the job, and `num_accelerators` the number of its GPUs. `reference` is the
    name of the Ray Serve application of the reference model; None if the attempt does not need this application from
    the beginning. Call this function before Ray launches the attempt, so that the database knows of every launch.
    """
    attempt = Attempt(job_id=job_id, number=number, reference=reference, num_accelerators=num_accelerators)
    attempt.token, attempt.next_seq = "", 0
    session.add(attempt)
    await session.flush()
    await session.execute(update(Job).where(Job.id == job_id).values(waits_for=None))
    await session.refresh(attempt)
    return attempt


async def give_token(session: AsyncSession, attempt: Attempt) -> str:
    """Creates a token for the next launch of the attempt (run of a job on Ray), stores the token's digest, and returns
    the token.

    The token of the previous launch stays valid: Ray may have accepted that launch although Ray's answer was lost.
    """
    token = secrets.token_urlsafe(32)
    digests = func.right(func.concat_ws(" ", Attempt.token, digest(token)), 2 * len(digest(token)) + 1)
    statement = update(Attempt).where(Attempt.job_id == attempt.job_id, Attempt.number == attempt.number)
    await session.execute(statement.values(token=digests))
    return token


async def want(session: AsyncSession, attempt: Attempt, loaded: NamedModel, app_name: str) -> None:
    """Stores that the attempt (run of a job) needs the Ray Serve application `app_name`, which loads the model
    `loaded`.

    Ray Serve then loads the model, and keeps it loaded for the attempt.
    """
    statement = update(Attempt).where(Attempt.job_id == attempt.job_id, Attempt.number == attempt.number)
    await session.execute(statement.values(reference=app_name))
    await deployments.use(session, loaded, app_name=app_name, for_job=True)


async def mark_launched(session: AsyncSession, attempt: Attempt) -> None:
    statement = update(Attempt).where(Attempt.job_id == attempt.job_id, Attempt.number == attempt.number)
    await session.execute(statement.where(Attempt.state == "launching").values(state="running"))


async def end(session: AsyncSession, attempt: Attempt, reason: str, *, failed: bool = False) -> bool:
    """Marks the attempt (run of a job on Ray) as ended, for `reason`. Returns whether the attempt was still open before
    this call.

    Later reports of the attempt are refused. `failed` says whether the end counts as a failure of the attempt.
    """
    await _hold(session, attempt.job_id)
    statement = update(Attempt).where(Attempt.job_id == attempt.job_id, Attempt.number == attempt.number)
    statement = statement.where(Attempt.state != "ended").returning(Attempt.number)
    values = {"state": "ended", "ended_at": func.now(), "reason": reason, "failed": failed}
    if ended := (await session.execute(statement.values(**values))).first() is not None:
        how = reason if reason in ("succeeded", "failed") else "died" if failed else "other"
        telemetry.ATTEMPTS_ENDED.labels(how).inc()
        await quotas.count_hours(session, attempt)
        job = update(Job).where(Job.id == attempt.job_id).values(progress=None)
        _trace(attempt, how, await session.scalar(job.returning(Job.traceparent)))
    return ended


def _trace(attempt: Attempt, how: str, parent: str | None) -> None:
    tracing.record(
        "attempt",
        parent=parent,
        key=attempt.submission_id,
        start=attempt.created_at.timestamp(),
        end=datetime.now(UTC).timestamp(),
        attributes={"raydpo.job": attempt.job_id, "raydpo.attempt": attempt.number, "raydpo.end": how},
    )


async def last_failure(session: AsyncSession, job_id: str) -> str | None:
    """Returns why the newest failed attempt (run on Ray) of the job ended. Returns None if no attempt failed."""
    newest = select(Attempt.reason).where(Attempt.job_id == job_id, Attempt.failed).order_by(Attempt.number.desc())
    return await session.scalar(newest.limit(1))


async def note_stop(session: AsyncSession, attempt: Attempt, reason: str) -> None:
    """Stores the reason why the service stops the attempt (run of a job on Ray), and adds an event to the job.

    Does nothing if a reason is stored already.
    """
    await _hold(session, attempt.job_id)
    statement = update(Attempt).where(Attempt.job_id == attempt.job_id, Attempt.number == attempt.number)
    statement = statement.where(Attempt.reason.is_(None)).values(reason=reason)
    if (await session.execute(statement.returning(Attempt.number))).first() is not None:
        jobs.tell(
            session,
            attempt.job_id,
            f"The service is stopping attempt {attempt.number} of the job: {reason}",
            level="warn",
        )


async def authorize(session: AsyncSession, job_id: str, number: int, token: str, own_token: str | None = None) -> None:
    """Raises Fenced if the attempt (run of a job on Ray) with this number has ended, or if `token` is not one of the
    attempt's tokens.

    If `own_token` is given, it replaces `token` from now on. Ray's list of jobs shows the token of a launch, but only
    the training process knows `own_token`.
    """
    attempt = await session.get(Attempt, (job_id, number))
    if attempt is None or attempt.state == "ended" or digest(token) not in attempt.token.split():
        raise _not_its_own(job_id, number)
    if own_token:
        await _hold(session, job_id)
        exchange = update(Attempt).where(Attempt.job_id == job_id, Attempt.number == number)
        exchange = exchange.where(Attempt.token.contains(digest(token))).values(token=digest(own_token))
        if (await session.execute(exchange.returning(Attempt.number))).first() is None:
            raise _not_its_own(job_id, number)  # another request replaced the token meanwhile


def _not_its_own(job_id: str, number: int) -> Fenced:
    return Fenced(
        f"Attempt {number} of job {job_id} has ended, or the token belongs to another attempt; "
        "this training process must stop."
    )


async def record(
    session: AsyncSession,
    job_id: str,
    number: int,
    events: Sequence[JobEvent],
    settings: Settings,
    *,
    posted: bool,
) -> None:
    """Records the reports `events` of an attempt (run of a job on Ray), in order. A report that was recorded before is
    not recorded again. `number` is the attempt's number within the job.

    `posted` says where the reports come from. If true, the training process sent them, and even repeated reports show
    that the attempt is alive. If false, the service read them from the attempt's files in storage, and only new reports
    show that the attempt is alive. Raises Fenced if the attempt has ended.
    """
    await _hold(session, job_id)
    attempt = await session.get(Attempt, (job_id, number), with_for_update=True, populate_existing=True)
    if attempt is None or attempt.state == "ended":
        raise Fenced(f"Attempt {number} of job {job_id} has ended; this training process must stop.")
    new, expected = list[JobEvent](), attempt.next_seq
    for event in events:
        if event.seq < expected:
            continue
        if event.seq > expected and posted:
            raise InvalidRequest(f"Report {event.seq} came before report {expected}; send report {expected} first.")
        if event.seq > expected:
            lost = (
                f"Reports {expected} to {event.seq - 1} of attempt {number} are lost, so events or metrics are missing"
            )
            jobs.tell(session, job_id, f"{lost}: the file that kept these reports in storage is damaged", level="warn")
        new.append(event)
        expected = event.seq + 1
    await _record_all(session, attempt, new, settings)
    if posted or new:
        attempt.next_seq, attempt.reported_at = expected, func.clock_timestamp()
    telemetry.EVENTS.inc(len(new))


async def _record_all(session: AsyncSession, attempt: Attempt, events: Sequence[JobEvent], settings: Settings) -> None:
    """Records reports of the attempt (run of a job on Ray). Skips a report that the database refuses, and adds an event
    to the job that says so.
    """
    if not events:
        return
    try:
        async with session.begin_nested():
            with session.no_autoflush:  # so that progress, which changes with each report, is written once
                for event in events:
                    await _record_one(session, attempt, event, settings)
    except Exception as error:
        refused = isinstance(error, DBAPIError) and refuses_value(error)
        if isinstance(error, ApiError | SQLAlchemyError) and not refused:
            raise
        await session.refresh(attempt)
        if len(events) > 1:
            for event in events:
                await _record_all(session, attempt, [event], settings)
            return
        cause = str(getattr(error, "orig", repr(error))).partition("\n")[0]
        what = f"Report {events[0].seq} ({events[0].report.kind}) of attempt {attempt.number} could not be stored"
        jobs.tell(session, attempt.job_id, storable(f"{what} and is left out: {cause}"), level="warn")


async def _record_one(session: AsyncSession, attempt: Attempt, event: JobEvent, settings: Settings) -> None:
    report = event.report
    match report:
        case Message():
            await _tell_reported(session, attempt, event, report.message, level=report.level)
        case Progress():
            await _set_progress(session, attempt, report.stage, report.done, report.total, event.created_at)
        case ReferenceWanted():
            if report.app_name is None and attempt.reference:  # requested when the attempt was opened
                return
            model = models.reference_of(await session.get_one(Job, attempt.job_id))
            await want(session, attempt, *await deployments.scorer_named(session, settings, model, report.app_name))
        case ReferenceReleased():
            attempt.reference = None
        case Started():
            await session.execute(
                update(Job).where(Job.id == attempt.job_id).values(training=report.model_dump(mode="json"))
            )
            data = {"attempt": attempt.number, "resumed_from": report.resumed_from}
            await _tell_reported(session, attempt, event, _started(report), data=data)
        case StepMetrics():
            await _set_progress(session, attempt, "training", report.step, report.total_steps, event.created_at)
            data = _step_data(report)
            await _tell_reported(session, attempt, event, step_message(data), data=data, step=report.step)
        case CheckpointSaved():
            await _add_checkpoint(session, attempt, event, report, settings)
        case Succeeded() | Failed() | Paused():
            attempt.outcome = report.model_dump(mode="json")
        case Died():
            attempt.reason = attempt.reason or report.cause
        case Alive():
            pass
        case _:
            assert_never(report)


async def _tell_reported(
    session: AsyncSession,
    attempt: Attempt,
    event: JobEvent,
    message: str,
    *,
    level: str = "info",
    data: dict[str, Any] | None = None,
    step: int | None = None,
) -> None:
    values = {
        "public_id": jobs.new_event_id() if step is None else step_event_id(attempt.job_id, step),
        "job_id": attempt.job_id,
        "attempt": attempt.number,
        "seq": event.seq,
        "created_at": datetime.fromtimestamp(event.created_at, UTC),
        "level": level,
        "type": "message" if step is None else "metrics",
        "message": message,
        "data": data,
        "step": step,
    }
    row = select(*(literal(value, Event.__table__.c[name].type) for name, value in values.items()))
    if step is not None:  # a resumed attempt repeats steps after its checkpoint
        row = row.where(~is_packed(attempt.job_id, step))
    await session.execute(insert(Event).from_select(list(values), row).on_conflict_do_nothing())


async def _set_progress(session: AsyncSession, attempt: Attempt, stage: str, done: int, total: int, at: float) -> None:
    """Stores the job's progress: its current stage, such as training, with `done` of `total` units of work done.

    `at` is the Unix time of the report. Also stores the time and the number of done units at which the stage began,
    from which a client can compute the speed. While the attempt (the job's run on Ray) trains on the first rows, or
    prepares to, other rows may still be encoded; the progress of this encoding is stored separately.
    """
    job = await session.get_one(Job, attempt.job_id)
    before = job.progress or {}
    if before.get("attempt") != attempt.number:
        before = {}
    if stage == "encoding" and before.get("stage") in BESIDE_ENCODING:
        encoding = {"done": done, "total": total} if done < total else None
        job.progress = before | {"encoding": encoding}
        return
    known = before if before.get("stage") == stage and before["done"] <= done else None
    began = {"since": known["since"], "start": known["start"]} if known else {"since": at, "start": done}
    of_attempt = {"attempt": attempt.number, "encoding": before.get("encoding")}
    job.progress = {"stage": stage, "done": done, "total": total, "at": at, **began, **of_attempt}


async def _add_checkpoint(
    session: AsyncSession, attempt: Attempt, event: JobEvent, report: CheckpointSaved, settings: Settings
) -> None:
    """Adds a checkpoint that the attempt (run of a job) reported, with its model and an event, and plans its
    evaluations that the job asks for. Drops old checkpoints of the job.

    `report` describes the checkpoint, and `event` is the message that brought the report. A resumed attempt repeats
    training steps. If the job has a checkpoint of the same step already, only the metrics of that checkpoint are
    updated, because their last digits may differ.
    """
    job = await session.get_one(Job, attempt.job_id)
    known = update(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step == report.step)
    if (await session.execute(known.values(metrics=report.metrics).returning(Checkpoint.id))).first() is not None:
        return
    name = f"{jobs.fine_tuned_name(job, settings)}:ckpt-step-{report.step}"
    row = insert(Checkpoint).values(
        id=f"ftckpt_{secrets.token_hex(12)}",
        job_id=job.id,
        step=report.step,
        uri=report.uri,
        model_id=name,
        metrics=report.metrics,
    )
    await session.execute(row)
    await models.add(session, name, storage.join(report.uri, "model"), job)
    await _tell_reported(session, attempt, event, f"Checkpoint created at step {report.step}: {name}")
    await checkpoint_evaluations.plan(session, job, name, "checkpoints")
    await checkpoints.drop_old(session, job)


async def _hold(session: AsyncSession, job_id: str) -> None:
    """Locks the job's row until the transaction ends.

    Every writer of events must lock the rows of the job first and of the attempt (run of the job) second, to avoid
    deadlocks.
    """
    await session.execute(select(Job.id).where(Job.id == job_id).with_for_update(key_share=True))


def _started(report: Started) -> str:
    resumed = f", resuming after step {report.resumed_from}" if report.resumed_from else ""
    what = f"{report.num_groups} examples, {report.total_steps} steps"
    return f"Fine-tuning job started: {what}, learning rate {report.config.optim.learning_rate:g}{resumed}"


def _step_data(report: StepMetrics) -> dict[str, Any]:
    return {"step": report.step, "total_steps": report.total_steps, **jobs.wire_metrics(report.metrics)}

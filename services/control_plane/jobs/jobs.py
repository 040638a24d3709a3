"""The life of a job: all its moves from one state to another.

    queued ──► running ──► succeeded | failed
       ├── paused ──┤
       └────────────┴────► cancelled

A paused job goes back to queued. A move is one UPDATE. Its WHERE names the states that the move may start from and the
version that it was decided on. The move, its event and its entry in the log of transitions share a transaction.
"""

import secrets
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services import tracing
from services.contract import JobSpec, first_error, storable
from services.control_plane.core.errors import InvalidRequest, NotFound
from services.control_plane.core.store import append, now
from services.control_plane.core.tables import TERMINAL, Event, Job, Transition
from services.control_plane.jobs import weights
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings
from services.control_plane.tenants import quotas
from services.control_plane.webhooks import webhooks

MOVES = {  # state: the states from which a job may move to it
    "queued": ("paused",),
    "running": ("queued",),
    "paused": ("queued", "running"),
    "succeeded": ("running",),
    "failed": ("queued", "running"),
    "cancelled": ("queued", "running", "paused"),
}


class Stale(Exception):
    """The job has changed since a decision was made on it; decide again."""


def draft(spec: JobSpec, model: NamedModel, reference: NamedModel | None) -> Job:
    """Returns the job as it would be submitted, without an id. `reference` None: the objective has none."""
    return Job(
        spec=spec.model_dump(mode="json"),
        model_source=model.source,
        model_root=model.root,
        base_source=model.base_source,
        reference_source=reference.source if reference and spec.reference_model else None,
        priority=spec.priority,
        observed="queued",
    )


async def submit(
    session: AsyncSession, spec: JobSpec, model: NamedModel, reference: NamedModel | None, actor: str
) -> Job:
    """Writes the job and its first events."""
    job = draft(spec, model, reference)
    job.id, job.traceparent = f"ftjob-{secrets.token_hex(12)}", tracing.current()
    append(session, job)
    job.created_at = await now(session)
    _log(session, job.id, job.version, job.desired, job.observed, actor, "submitted")
    tell(session, job.id, f"Created fine-tuning job: {job.id}")
    validated = "Files are validated when it runs" if spec.is_at_uri else "Files validated"
    tell(session, job.id, f"{validated}, moving job to queued state: {spec.training_file}")
    tell(session, job.id, weights.in_words(spec.weights, model, reference))
    return job


async def find(session: AsyncSession, job_id: str) -> Job:
    job = await session.get(Job, job_id)
    if job is None:
        raise not_found(job_id)
    return job


def not_found(job_id: str) -> NotFound:
    return NotFound(f"Could not find fine tune: {job_id}", param="fine_tuning_job_id", code="fine_tune_not_found")


async def lock(session: AsyncSession, job: Job) -> Job:
    """Locks the job and returns it as it is now. Nobody moves it before this transaction ends."""
    return await session.get_one(Job, job.id, with_for_update=True, populate_existing=True)


async def confirm(session: AsyncSession, job: Job) -> None:
    """Locks the job. Raises Stale if its version is no longer the one that a decision was made on."""
    version = await session.scalar(select(Job.version).where(Job.id == job.id).with_for_update())
    if version != job.version:
        raise Stale(f"{job.id} is in version {version}, not {job.version}")


async def cancel(session: AsyncSession, job_id: str, actor: str) -> Job:
    """Asks for the job to be cancelled. A job that does not run is cancelled at once."""
    job = await lock(session, await find(session, job_id))
    if job.observed in TERMINAL:
        raise InvalidRequest(f"Job {job_id} has already {job.observed}; only a live job can be cancelled.")
    if job.desired != "cancel":
        await wish(session, job, "cancel", actor=actor, event="Cancellation requested")
    if job.observed != "running":
        await move(session, job, "cancelled", actor=actor, event="The job was cancelled")
    await session.refresh(job)
    return job


async def pause(session: AsyncSession, job_id: str, actor: str) -> Job:
    """Asks for the job to be paused. A job that does not run yet is paused at once."""
    job = await lock(session, await find(session, job_id))
    if job.observed not in ("queued", "running") or job.desired == "cancel":
        raise InvalidRequest(f"Job {job_id} is {_state(job)}; only a queued or a running job can be paused.")
    if job.desired != "pause":
        await wish(session, job, "pause", actor=actor, event="Pause requested")
    if job.observed == "queued":
        await move(session, job, "paused", actor=actor, event="The job is paused")
    await session.refresh(job)
    return job


async def resume(session: AsyncSession, job_id: str, actor: str) -> Job:
    """Asks for a paused job to run again. If it has not paused yet, it goes on. Raises OverQuota."""
    job = await lock(session, await find(session, job_id))
    if job.desired != "pause" or job.observed in TERMINAL:
        raise InvalidRequest(f"Job {job_id} is {_state(job)}; only a paused job can be resumed.")
    if job.observed == "paused":
        await quotas.admit_resumption(session, job.project_id)
    await wish(session, job, "run", actor=actor, event="Resumption requested")
    if job.observed == "paused":
        await move(session, job, "queued", {"progress": None}, actor=actor, event="The job is queued again")
    await session.refresh(job)
    return job


def _state(job: Job) -> str:
    if job.observed == "running" and job.desired != "run":
        return {"pause": "pausing", "cancel": "being cancelled"}[job.desired]
    return job.observed


async def wish(session: AsyncSession, job: Job, desired: str, *, actor: str, event: str) -> None:
    """Writes what the user wants of a job. The caller has locked the job."""
    job.desired, job.version = desired, job.version + 1
    _log(session, job.id, job.version, desired, job.observed, actor, event)
    tell(session, job.id, event)
    await session.flush()


async def move(
    session: AsyncSession,
    job: Job,
    to: str,
    values: Mapping[str, Any] = MappingProxyType({}),
    *,
    actor: str,
    event: str,
    level: str = "info",
) -> None:
    """Moves the job to another state, with an event. Raises Stale if its version is no longer `job.version`."""
    closing = {"finished_at": func.now(), "progress": None} if to in TERMINAL else {}
    statement = update(Job).where(Job.id == job.id, Job.observed.in_(MOVES[to]), Job.version == job.version)
    statement = statement.values(observed=to, version=Job.version + 1, waits_for=None, **closing, **values)
    moved = (await session.execute(statement.returning(Job.version, Job.desired))).first()
    if moved is None:
        raise Stale(f"{job.id} is no longer {job.observed} in version {job.version}")
    _log(session, job.id, moved.version, moved.desired, to, actor, event)
    tell(session, job.id, event, level=level)
    await webhooks.announce(session, job, to)


async def wait_for(session: AsyncSession, job: Job, what: str) -> None:
    """Writes what keeps a job, or its next attempt, from starting. An event says it once."""
    changed = update(Job).where(Job.id == job.id, Job.observed == job.observed, Job.waits_for.is_distinct_from(what))
    if (await session.execute(changed.values(waits_for=what).returning(Job.id))).first() is not None:
        tell(session, job.id, f"Waiting for {what}")


async def hold_back(session: AsyncSession, job: Job, what: str) -> None:
    """Writes what a running job without an attempt waits for."""
    await session.execute(update(Job).where(Job.id == job.id).values(waits_for=what))


def _log(
    session: AsyncSession, job_id: str, version: int, desired: str, observed: str, actor: str, reason: str
) -> None:
    row = Transition(job_id=job_id, version=version, desired=desired, observed=observed, actor=actor, reason=reason)
    append(session, row)


def replay(transitions: Sequence[Transition]) -> tuple[str, str, int]:
    """Returns the state that a job's log leads to: desired, observed, version. Raises ValueError at an illegal move."""
    for before, after in pairwise(transitions):
        stays = before.observed == after.observed
        if after.version != before.version + 1 or not (stays or before.observed in MOVES.get(after.observed, ())):
            raise ValueError(f"{after.job_id}: no rule leads from {before.observed} to {after.observed}.")
    last = transitions[-1]
    return last.desired, last.observed, last.version


async def log_of(session: AsyncSession, job_id: str) -> list[Transition]:
    """Returns all changes of the job's desired and observed state, in order."""
    query = select(Transition).where(Transition.job_id == job_id).order_by(Transition.version)
    return list(await session.scalars(query))


async def place_of(session: AsyncSession, job_id: str, event_id: str) -> int:
    """Returns the row id of an event of the job. Events of a job are ordered by it."""
    place = await session.scalar(select(Event.id).where(Event.public_id == event_id, Event.job_id == job_id))
    if place is None:
        raise InvalidRequest(f"{job_id} has no event '{event_id:.80}' to resume after.", param="Last-Event-ID")
    return place


def tell(
    session: AsyncSession, job_id: str, message: str, *, level: str = "info", data: dict[str, Any] | None = None
) -> None:
    """Adds an event of the service itself to the job."""
    append(session, Event(public_id=new_event_id(), job_id=job_id, level=level, message=message, data=data))


def new_event_id() -> str:
    return f"ftevent-{secrets.token_hex(12)}"


def fine_tuned_name(job: Job, settings: Settings) -> str:
    """Returns the name of the job's policy: `ft:base:org:suffix:` and the job's 24 digits, so it is unique."""
    digits = job.id.removeprefix("ftjob-")
    return f"ft:{job.model_root}:{settings.organization}:{job.spec['suffix'] or ''}:{digits}"


def unreadable(job: Job) -> dict[str, str | None] | None:
    """Returns the error of a job that another release stored and this one cannot read; None if it can."""
    try:
        JobSpec.model_validate(job.spec)
    except ValidationError as error:
        message = f"This release cannot read what the job asks for ({first_error(error)}); submit it again."
        return {"code": "unreadable_job", "message": storable(message), "param": None}
    return None


WIRE_NAMES = {  # our metric keys, as OpenAI's events, checkpoints and result files spell them
    "loss": "train_loss",
    "mean_token_accuracy": "train_mean_token_accuracy",
    "rewards/accuracies": "train_reward_accuracy",
    "rewards/margins": "train_reward_margin",
    "rewards/chosen": "rewards_chosen",
    "rewards/rejected": "rewards_rejected",
    "logps/chosen": "logps_chosen",
    "logps/rejected": "logps_rejected",
    "grad_norm": "grad_norm",
    "lr": "learning_rate",
    "tokens_per_second": "tokens_per_second",
    "eval/loss": "full_valid_loss",
    "eval/mean_token_accuracy": "full_valid_mean_token_accuracy",
    "eval/rewards/accuracies": "full_valid_reward_accuracy",
    "eval/rewards/margins": "full_valid_reward_margin",
}


def wire_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Returns metrics under OpenAI's names, for which existing programs look. Others keep their names.

    OpenAI evaluates a sample of the validation file at most steps, and all of it at some. Here it is always all of it,
    so each value has the sample's name too.
    """
    named = {WIRE_NAMES.get(key, key): value for key, value in metrics.items()}
    return named | {key.removeprefix("full_"): value for key, value in named.items() if key.startswith("full_valid_")}


async def metrics_of(session: AsyncSession, job_id: str) -> list[dict[str, Any]]:
    """Returns the data of the job's metrics events, by step."""
    query = select(Event.data).where(Event.job_id == job_id, Event.step.is_not(None)).order_by(Event.step)
    return [data for data in await session.scalars(query) if data is not None]

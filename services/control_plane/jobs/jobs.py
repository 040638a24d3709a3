"""Creates jobs, and makes all changes of their states. No other module changes the state of a job.

A job has two states. The desired state (`run`, `pause` or `cancel`) is what the user wants. The observed state is where
the job is; it changes along these arrows:

    queued ──► running ──► succeeded | failed
       ├── paused ──┤
       └────────────┴────► cancelled

A resumed job changes from paused to queued. Each change of the observed state is one UPDATE. Its WHERE names the states
from which the change is allowed, and the version that the job had when the change was decided. The change, its event
and its row in the table `transitions` share a transaction.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from sqlalchemy import bindparam, func, select, text, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from services import tracing
from services.contract import JobSpec, first_error, storable
from services.control_plane.core.errors import InvalidRequest, NotFound
from services.control_plane.core.store import append, now
from services.control_plane.core.tables import TERMINAL, Event, Job, Transition
from services.control_plane.jobs import weights
from services.control_plane.jobs.plans.plans import MISFIT_AFTER, MISFIT_GAP
from services.control_plane.models.deployments import engines
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
    """Raised if a job has changed since a decision about it was made. The caller must decide again."""


def draft(spec: JobSpec, model: NamedModel, reference: NamedModel | None) -> Job:
    """Returns the row of a new job, not yet in the database and without an id.

    `spec` is the job's complete description, and `model` the model that the job starts from. `reference` is the job's
    reference model, None if the job's objective (training method) uses none.
    """
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
    session: AsyncSession,
    spec: JobSpec,
    model: NamedModel,
    reference: NamedModel | None,
    actor: str,
    settings: Settings,
    *,
    are_checked: bool = True,
) -> Job:
    """Adds a new job, and the first events of its history, to the database. Returns the job.

    `spec` is the job's complete description, and `model` the model that the job starts from. `reference` is the job's
    reference model, None if the job's objective (training method) uses none. `actor` is the id of the API key that
    submits the job. `are_checked` says whether the rows of the job's files have been checked.
    """
    job = draft(spec, model, reference)
    job.id, job.traceparent = f"ftjob-{secrets.token_hex(12)}", tracing.current()
    append(session, job)
    job.created_at = await now(session)
    _log(session, job.id, job.version, job.desired, job.observed, actor, "submitted")
    tell(session, job.id, f"Created fine-tuning job: {job.id}")
    validated = "Files are validated when the job runs" if spec.is_at_uri else "Files validated"
    validated = validated if are_checked else "Files are still being validated"
    tell(session, job.id, f"{validated}, moving job to queued state: {spec.training_file}")
    own_engine = await _own_engine(session, settings, spec, model)
    tell(session, job.id, f"{weights.in_words(spec.weights, model, reference)}{own_engine}")
    return job


async def _own_engine(session: AsyncSession, settings: Settings, spec: JobSpec, start: NamedModel) -> str:
    """Returns the end of a sentence for an event: the reason why the adapter that the job trains will have an engine (a
    model server) of its own. `start` is the model that the job starts from.

    Returns '' if the engine of the base model will answer for the adapter. Also returns '' if the job trains no adapter
    or a reward model.
    """
    if spec.config.objective.traits.num_outputs:  # a reward model does not answer
        return ""
    why = await engines.why_merged_on(session, settings, start, spec.weights)
    return f"; the policy will be merged into its base and answer from an engine of its own: {why}" if why else ""


async def find(session: AsyncSession, job_id: str) -> Job:
    job = await session.get(Job, job_id)
    if job is None:
        raise not_found(job_id)
    return job


def not_found(job_id: str) -> NotFound:
    return NotFound(
        f"Could not find fine tune: {job_id}. List the project's jobs for their ids.",
        param="fine_tuning_job_id",
        code="fine_tune_not_found",
    )


async def lock(session: AsyncSession, job: Job) -> Job:
    """Locks the job's row until this transaction ends, so that nobody else can change the job. Returns the current
    row."""
    return await session.get_one(Job, job.id, with_for_update=True, populate_existing=True)


async def confirm(session: AsyncSession, job: Job) -> None:
    """Locks the job's row. Raises Stale if the job was changed in the database after `job` was read."""
    version = await session.scalar(select(Job.version).where(Job.id == job.id).with_for_update())
    if version != job.version:
        raise Stale(f"the job {job.id} was changed after it was read: its version is {version}, not {job.version}")


async def cancel(session: AsyncSession, job_id: str, actor: str) -> Job:
    """Sets the job's desired state to `cancel`, and returns the job. If the job is not running, cancels it immediately.

    `actor` is the id of the API key that sent the request. Raises InvalidRequest if the job has ended.
    """
    job = await lock(session, await find(session, job_id))
    if job.observed in TERMINAL:
        raise InvalidRequest(
            f"Job {job_id} has ended ({job.observed}); only a job that has not ended can be cancelled."
        )
    if job.desired != "cancel":
        await wish(session, job, "cancel", actor=actor, event="Cancellation requested")
    if job.observed != "running":
        await move(session, job, "cancelled", actor=actor, event="The job was cancelled")
    await session.refresh(job)
    return job


async def pause(session: AsyncSession, job_id: str, actor: str) -> Job:
    """Sets the job's desired state to `pause`, and returns the job. If the job is queued, pauses it immediately.

    `actor` is the id of the API key that sent the request. Raises InvalidRequest if the job is neither queued nor
    running, or is being cancelled.
    """
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
    """Sets the job's desired state to `run`, and returns the job. A paused job is queued again; a job that has not
    paused yet continues.

    `actor` is the id of the API key that sent the request. Raises InvalidRequest if the user has not paused the job,
    and OverQuota if the project may not queue another job.
    """
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
    """Sets the job's desired state (`run`, `pause` or `cancel`), and adds one to the job's version.

    Also adds `event` to the job's events and to the log of its state changes. `actor` is the id of the API key that
    asks for this state. The caller must hold the lock of the job's row.
    """
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
    """Changes the job's observed state to `to`, sets the columns in `values`, and adds an event with the message
    `event` and the level `level` (`info`, `warn` or `error`).

    `actor` is the id of the API key, or the name of the control plane, that makes the change. If `to` is a state that
    ends the job, also adds messages for the webhooks of the job's project. Raises Stale if the job was changed in the
    database after `job` was read.
    """
    closing = {"finished_at": func.now(), "progress": None} if to in TERMINAL else {}
    statement = update(Job).where(Job.id == job.id, Job.observed.in_(MOVES[to]), Job.version == job.version)
    statement = statement.values(
        observed=to, version=Job.version + 1, waits_for=None, misfit_since=None, **closing, **values
    )
    moved = (await session.execute(statement.returning(Job.version, Job.desired))).first()
    if moved is None:
        raise Stale(f"the job {job.id} was changed after it was read: it was {job.observed} in version {job.version}")
    _log(session, job.id, moved.version, moved.desired, to, actor, event)
    tell(session, job.id, event, level=level)
    if to in TERMINAL:
        await webhooks.announce(session, job.project_id, webhooks.JOB_EVENTS[to], job.id)


WAIT_FOR = text(
    "WITH changed AS (SELECT jobs.id, new.what FROM jobs"
    " JOIN jsonb_to_recordset(:reasons) AS new(id text, observed text, what text) USING (id, observed)"
    " WHERE waits_for IS DISTINCT FROM new.what FOR NO KEY UPDATE OF jobs SKIP LOCKED)"
    " UPDATE jobs SET waits_for = what FROM changed WHERE jobs.id = changed.id RETURNING jobs.id, what"
).bindparams(bindparam("reasons", type_=JSONB))


async def wait_for(session: AsyncSession, reasons: Sequence[tuple[Job, str]]) -> None:
    """Stores in each job's column `waits_for` the reason why the job does not start yet.

    `reasons` are pairs of a job and its reason. Adds an event to each job whose reason is new. Leaves out jobs that
    another transaction is changing at the moment.
    """
    given = [{"id": job.id, "observed": job.observed, "what": what} for job, what in reasons]
    for row in await session.execute(WAIT_FOR, {"reasons": given}):
        tell(session, row.id, f"Waiting for {row.what}")


NOTE_MISFITS = text(
    "WITH noted AS (SELECT id, id = ANY(:misfits) AS is_misfit FROM jobs WHERE id = ANY(:waiting) AND"
    " CASE WHEN id = ANY(:misfits)"
    " THEN misfit_since IS NULL OR (misfit_seen_at > now() - interval '1 minute') IS NOT TRUE"
    " ELSE misfit_since IS NOT NULL END FOR NO KEY UPDATE SKIP LOCKED)"
    " UPDATE jobs SET misfit_seen_at = now(), misfit_since = CASE"
    " WHEN is_misfit THEN coalesce(CASE WHEN misfit_seen_at > now() - :gap THEN misfit_since END, now()) END"
    " FROM noted WHERE jobs.id = noted.id"
)


async def note_misfits(session: AsyncSession, waiting: Sequence[str], misfits: Collection[str]) -> list[str]:
    """Stores for each job in `misfits` the time since which the cluster is too small for the job. Clears this time for
    the other jobs in `waiting`. `misfits` and `waiting` hold ids of jobs; `waiting` includes all of `misfits`.

    For a job in `misfits` for which the function was not called for MISFIT_GAP, the time begins anew. Leaves out jobs
    that another transaction is changing at the moment.

    Returns the ids of those jobs for which the cluster has been too small for MISFIT_AFTER.
    """
    given = {"waiting": list(waiting), "misfits": list(misfits), "gap": MISFIT_GAP}
    await session.execute(NOTE_MISFITS, given)
    seen = Job.misfit_seen_at > func.now() - MISFIT_GAP
    overdue = select(Job.id).where(Job.id.in_(misfits), seen, Job.misfit_since < func.now() - MISFIT_AFTER)
    return list(await session.scalars(overdue))


async def hold_back(session: AsyncSession, job: Job, what: str) -> None:
    """Stores the text `what` in a job's column `waits_for`: the reason why the job's next attempt (run on Ray) has not
    begun. The job's last attempt has ended, but the job's state is still `running`. Adds no event.
    """
    await session.execute(update(Job).where(Job.id == job.id).values(waits_for=what))


def _log(
    session: AsyncSession, job_id: str, version: int, desired: str, observed: str, actor: str, reason: str
) -> None:
    row = Transition(job_id=job_id, version=version, desired=desired, observed=observed, actor=actor, reason=reason)
    append(session, row)


def replay(transitions: Sequence[Transition]) -> tuple[str, str, int]:
    """Computes a job's states from its log of state changes. Returns three values: the desired state, the observed
    state and the version that the job has after the changes.

    `transitions` are all state changes of the job, in order. Raises ValueError if one of the changes is not allowed.
    """
    for before, after in pairwise(transitions):
        stays = before.observed == after.observed
        if after.version != before.version + 1 or not (stays or before.observed in MOVES.get(after.observed, ())):
            raise ValueError(
                f"The job {after.job_id} went from {before.observed} to {after.observed}, which no rule allows."
            )
    last = transitions[-1]
    return last.desired, last.observed, last.version


async def log_of(session: AsyncSession, job_id: str) -> list[Transition]:
    """Returns the job's transitions, in order: all changes of its desired and its observed state."""
    query = select(Transition).where(Transition.job_id == job_id).order_by(Transition.version)
    return list(await session.scalars(query))


def tell(
    session: AsyncSession, job_id: str, message: str, *, level: str = "info", data: dict[str, Any] | None = None
) -> None:
    """Adds an event with this message to the job's history. The event is the service's own, not a report of a training
    process.

    `level` is `info`, `warn` or `error`. `data` holds further values of the event for programs, None if there are none.
    """
    append(session, Event(public_id=new_event_id(), job_id=job_id, level=level, message=message, data=data))


def new_event_id() -> str:
    return f"ftevent-{secrets.token_hex(12)}"


def fine_tuned_name(job: Job, settings: Settings) -> str:
    """Returns the unique name of the model that the job trains, `ft:<base model>:<organization>:<suffix>:<digits>`. The
    user chooses the suffix, which may be empty; the 24 digits are those of the job's id.
    """
    digits = job.id.removeprefix("ftjob-")
    return f"ft:{job.model_root}:{settings.organization}:{job.spec['suffix'] or ''}:{digits}"


def unreadable(job: Job) -> dict[str, str | None] | None:
    """Returns the error with which a job must end, if this release cannot read the job's stored spec (description).
    Returns None if this release can read the spec.

    Another release of the service may have stored the spec.
    """
    try:
        JobSpec.model_validate(job.spec)
    except ValidationError as error:
        message = (
            f"This release of the service cannot read the stored job ({first_error(error)}); submit the job again."
        )
        return {"code": "unreadable_job", "message": storable(message), "param": None}
    return None


WIRE_NAMES = {  # our names of metrics: OpenAI's names in events, checkpoints and result files
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
    """Returns the metrics under OpenAI's names, which existing programs expect. Metrics that OpenAI does not have keep
    their names.

    OpenAI evaluates the whole validation file only at some steps (`full_valid_…`), and a sample of it at the other
    steps (`valid_…`). This service always evaluates the whole file, so each value on validation data gets both names.
    """
    named = {WIRE_NAMES.get(key, key): value for key, value in metrics.items()}
    return named | {key.removeprefix("full_"): value for key, value in named.items() if key.startswith("full_valid_")}

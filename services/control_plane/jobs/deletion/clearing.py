"""Removes, in the regular cleanup, what is left of deleted jobs, and what ended jobs no longer need.

A deleted job is removed in two steps, each of which may be interrupted and repeated. The first step removes the job's
events and files, except the files of models that still exist. The second step follows when a day has passed and all
models of the job are removed. It removes the job's rows, and the files that a process on the cluster wrote meanwhile.
"""

import logging
import random
from datetime import timedelta
from typing import Any, cast

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.engine import CursorResult

from services import storage
from services.control_plane.core.errors import ApiError
from services.control_plane.core.removal import remove_bytes, without_options
from services.control_plane.core.store import Store
from services.control_plane.core.tables import (
    Attempt,
    Checkpoint,
    Event,
    File,
    Job,
    JobEvaluation,
    Model,
    StepBlock,
    SweepTrial,
    Transition,
)
from services.control_plane.jobs import jobs
from services.control_plane.jobs.deletion import deletion
from services.control_plane.settings import Settings

log = logging.getLogger(__name__)

EVENTS_AT_ONCE = 10_000  # events that one transaction deletes
# How long the rows of a deleted job's attempts (runs on Ray) stay. Until then they count for its project's share of
# the cluster, and the service stops such a run if it still works.
ROWS_KEPT = timedelta(days=1)
SHOWN = ("logs", "wandb", "mlflow", "tensorboard", "export")  # folders of an ended job that users may still look at
CLEARED = (
    "Removed from storage, {:g} days after the job's end, what only a running job needs: the state of the optimizer, "
    "and the files with the reports of its training processes. The job's events and metrics stay"
)


async def clear(store: Store, settings: Settings, most: int) -> None:
    """Removes the events and files of at most `most` deleted jobs, except the files of models that still exist.

    Also removes, for at most `most` jobs that ended more than `run_files_days` ago, the files that only a running job
    needs.
    """
    deleted = select(Job.id).where(Job.deleted_at.is_not(None), Job.cleared_at.is_(None))
    due = await _some(store, deleted, most)
    if settings.run_files_days:
        over = func.now() - timedelta(days=settings.run_files_days)
        ended = select(Job.id).where(Job.finished_at < over, Job.cleared_at.is_(None)).order_by(Job.finished_at)
        due += await _some(store, ended, most)
    for job_id in due:
        await _clear(store, settings, job_id)


async def expire(store: Store, settings: Settings, most: int) -> None:
    """Marks at most `most` jobs as deleted that ended more than `job_days` ago. Leaves out jobs of sweeps and of rounds
    (repeated training of a policy)."""
    if not settings.job_days:
        return
    over = func.now() - timedelta(days=settings.job_days)
    of_sweep = select(SweepTrial.job_id).where(SweepTrial.job_id == Job.id).exists()
    old = select(Job.id).where(Job.finished_at < over, Job.deleted_at.is_(None), ~of_sweep).order_by(Job.finished_at)
    for job_id in await _some(store, old, most):
        try:
            async with store.begin() as session:
                await deletion.remove(session, settings, job_id, with_models=False)
        except ApiError:  # it belongs to rounds, or a user has just deleted it
            continue
        log.info("Deleted the job %s, because it ended more than %g days ago", job_id, settings.job_days)


async def _some(store: Store, query: Select[str], most: int) -> list[str]:
    """Returns at most `most` results of the query, chosen at random from the first ten times as many. So jobs whose
    files cannot be removed do not stop the others.
    """
    async with store.begin() as session:
        found = list(await session.scalars(query.limit(10 * most)))
    return random.sample(found, min(most, len(found)))


async def _clear(store: Store, settings: Settings, job_id: str) -> None:
    async with store.begin() as session:
        if (job := await session.get(Job, job_id)) is None:
            return
        alive = select(Model.source).where(Model.job_id == job_id, Model.deleted_at.is_(None))
        kept = list(await session.scalars(alive))
        results = await session.scalar(select(File.uri).where(File.id == job.result_file))
    run_uri = storage.join(settings.storage_url, "runs", job_id)
    moved = any(not without_options(uri).startswith(without_options(run_uri) + "/") for uri in kept)
    if job.deleted_at is None:
        kept += [storage.join(run_uri, name) for name in SHOWN]
    else:
        await _forget_events(store, job_id)
        if results is not None and not await remove_bytes(results):
            return
    if moved:
        log.warning("The files of the job %s stay in storage: its models lie outside %s", job_id, run_uri)
    elif not await remove_bytes(run_uri, but=kept):
        return
    async with store.begin() as session:
        unchanged = Job.deleted_at.is_not_distinct_from(job.deleted_at)  # nobody has deleted it meanwhile
        cleared = update(Job).where(Job.id == job_id, unchanged, Job.cleared_at.is_(None)).values(cleared_at=func.now())
        if await session.scalar(cleared.returning(Job.id)) and job.deleted_at is None and not moved:
            jobs.tell(session, job_id, CLEARED.format(settings.run_files_days))


async def _forget_events(store: Store, job_id: str) -> None:
    some = select(Event.id).where(Event.job_id == job_id).limit(EVENTS_AT_ONCE)
    left = EVENTS_AT_ONCE
    while left == EVENTS_AT_ONCE:
        async with store.begin() as session:
            gone = await session.execute(delete(Event).where(Event.id.in_(some)))
            left = cast(CursorResult[Any], gone).rowcount
    async with store.begin() as session:
        await session.execute(delete(StepBlock).where(StepBlock.job_id == job_id))


async def forget(store: Store, settings: Settings, most: int) -> None:
    """Removes at most `most` jobs that were deleted at least a day ago and whose models are all removed: their rows and
    their last files.
    """
    models = select(Model.id).where(Model.job_id == Job.id, Model.removed_at.is_(None))
    over = select(Job.id).where(Job.deleted_at < func.now() - ROWS_KEPT, Job.cleared_at.is_not(None))
    for job_id in await _some(store, over.where(~models.exists()), most):
        if not await remove_bytes(storage.join(settings.storage_url, "runs", job_id)):
            continue
        await _forget_events(store, job_id)
        async with store.begin() as session:
            for part in (Transition, Attempt, Checkpoint, JobEvaluation, Model):
                await session.execute(delete(part).where(part.job_id == job_id))
            await session.execute(delete(Job).where(Job.id == job_id))

"""Removes expired and deleted objects from storage and the database, and stops Ray jobs that nobody needs any more.

A sweep is one pass over the objects of one kind. A sweep may run twice, or in two processes at the same time, without
harm. Each sweep removes a limited number of objects; the next sweep continues with the rest. Sweeps run beside the
reconciler, in the one control plane that handles jobs.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import anyio.to_thread
import httpx
from sqlalchemy import ARRAY, ColumnElement, Text, any_, delete, func, literal, select, tuple_, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from services import storage
from services.contract import USED
from services.control_plane import erasure, side_jobs
from services.control_plane.core.log_setup import Trouble
from services.control_plane.core.removal import remove_bytes
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Attempt, Checkpoint, File, Job, Lease, Model, Outbound, Upload
from services.control_plane.files import files, uploads
from services.control_plane.http import idempotency
from services.control_plane.jobs.deletion import clearing
from services.control_plane.jobs.events import packing
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from services.control_plane.tenants import usage
from services.control_plane.webhooks.outbox import give_up_old

log = logging.getLogger(__name__)

MOST = 100  # rows, or files in storage, that one sweep removes
MOST_JOBS = 10_000  # old jobs that one sweep marks as deleted, which takes few milliseconds for each
OUTBOX_KEPT = timedelta(days=30)
GRACE_SECONDS = 86_400  # a file in storage that no database row names after this long will get no row
EXIT_GRACE = timedelta(seconds=60)  # how long the Ray job of an ended attempt gets to exit
UPGRADE_SECONDS = 3600  # an upgrade, or its rollback, is over within this time
TRASH_SECONDS = 30 * 86_400  # files stay in the trash for this long, in case an older database is restored


class Sweeper:
    """Runs the sweeps (passes of the cleanup), each at its own interval. After a start of the process, all sweeps run
    once."""

    def __init__(self, store: Store, ray_api: RayApi, settings: Settings) -> None:
        self._store, self._ray_api, self._settings = store, ray_api, settings
        self._sweeps: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (30, self._expire_files),
            (30, self._expire_uploads),
            (60, self._stop_orphans),
            (600, self._forget),
            (60, self._remove_models),
            (3600, self._expire_jobs),
            (60, self._clear_jobs),
            (3600, self._forget_jobs),
            (60, self._erase_projects),
            (10, self._pack_steps),
            (3600, self._put_away),
            (3600, self._empty_trash),
            (3600, self._remove_parts),
            (3600, self._remove_prepared),
        ]
        self._began = time.monotonic()
        self._swept = [float("-inf")] * len(self._sweeps)
        self._troubles = [Trouble(log, f"Sweeper.{sweep.__name__}") for _, sweep in self._sweeps]

    async def sweep(self) -> None:
        """Runs the sweeps (passes of the cleanup) that are due. A sweep that fails is logged, and runs again when it is
        next due."""
        for number, (seconds, sweep) in enumerate(self._sweeps):
            if time.monotonic() - self._swept[number] < seconds:
                continue
            self._swept[number] = time.monotonic()
            try:
                await sweep()
                self._troubles[number].passed()
            except Exception as error:  # nobody watches this task, so the other sweeps go on after any error
                is_away = isinstance(error, SQLAlchemyError | httpx.HTTPError | OSError)
                message = "The regular cleanup (%s) failed and is tried again: %r"
                self._troubles[number].failed(message, sweep.__name__, error, exc_info=not is_away)

    async def _expire_files(self) -> None:
        async with self._store.begin() as session:
            uris = await files.expire(session, MOST)
        await _remove(uris)

    async def _expire_uploads(self) -> None:
        async with self._store.begin() as session:
            folders = await uploads.expire(session, MOST, self._settings)
        await _remove(folders)

    async def _stop_orphans(self) -> None:
        for submission_id in await stop_orphans(self._store, self._ray_api):
            log.warning("Stopped the Ray job %s, because its attempt has ended", submission_id)
        for submission_id in await side_jobs.stop_late(self._store, self._ray_api):
            log.warning("Stopped the Ray job %s, because it ran for too long", submission_id)

    async def _forget(self) -> None:
        sent = delete(Outbound).where(Outbound.due_at.is_(None), Outbound.created_at < func.now() - OUTBOX_KEPT)
        async with self._store.begin() as session:
            await idempotency.forget_old(session)
            await session.execute(delete(Lease).where(Lease.expires_at < func.now() - timedelta(days=1)))
            await session.execute(sent)
            await give_up_old(session)
            await usage.forget_writers(session)
            side_jobs_left = await side_jobs.forget_old(session, MOST)
        await _remove(side_jobs_left)

    async def _expire_jobs(self) -> None:
        await clearing.expire(self._store, self._settings, MOST_JOBS)

    async def _clear_jobs(self) -> None:
        await clearing.clear(self._store, self._settings, MOST)

    async def _forget_jobs(self) -> None:
        await clearing.forget(self._store, self._settings, MOST)

    async def _erase_projects(self) -> None:
        await erasure.erase(self._store, self._settings, MOST)

    async def _pack_steps(self) -> None:
        """Packs the metrics of past training steps into blocks (compact tables). Does nothing in the first
        UPGRADE_SECONDS of this process, because a control plane of an older release, which cannot read blocks, may
        still run then.

        Such a control plane would show only the steps that are not in blocks, and write only these into result files.
        """
        if time.monotonic() - self._began > UPGRADE_SECONDS:
            await packing.pack(self._store, MOST)

    async def _put_away(self) -> None:
        """Moves files in storage from the folder `files` to the folder `trash`, if no row of the database names them.

        Files whose rows are marked as deleted, and the remains of interrupted writes, are deleted immediately instead.
        """
        ages = await self._ages("files")
        old = [name for name, seconds in ages.items() if seconds > GRACE_SECONDS]
        async with self._store.begin() as session:
            named = set(await session.scalars(select(File.id).where(_among(File.id, old), File.deleted_at.is_(None))))
            unnamed = [name for name in old if name not in named][:MOST]
            deleted = set(await session.scalars(select(File.id).where(_among(File.id, unnamed))))
        over = [name for name in unnamed if name in deleted or name.startswith(".")]
        await _remove([self._place("files", name) for name in over])
        for name in set(unnamed) - set(over):
            await self._move(name, "files", "trash")

    async def _empty_trash(self) -> None:
        """Deletes files that have been in the storage folder `trash` for TRASH_SECONDS. If a database row names a file,
        moves the file back instead.

        A row can name a file in the trash after the database was restored to an earlier moment.
        """
        ages = await self._ages("trash")
        async with self._store.begin() as session:
            alive = select(File.id).where(_among(File.id, list(ages)), File.deleted_at.is_(None))
            named = set(await session.scalars(alive))
        for name in list(named)[:MOST]:
            await self._move(name, "trash", "files")
        old = [name for name, seconds in ages.items() if seconds > TRASH_SECONDS and name not in named]
        await _remove([self._place("trash", name) for name in old[:MOST]])

    async def _remove_parts(self) -> None:
        """Deletes parts of uploads that have ended, and old parts of uploads that the database does not know."""
        listed = await self._folders("uploads")
        async with self._store.begin() as session:
            rows = await session.execute(select(Upload.id, Upload.state).where(_among(Upload.id, listed)))
            states = {row.id: row.state for row in rows}
        over = [name for name in listed if states.get(name, "pending") != "pending"]
        for name in set(listed) - set(states):
            ages = await self._ages("uploads", name)
            if min(ages.values(), default=GRACE_SECONDS + 1) > GRACE_SECONDS:
                over.append(name)
        await _remove([self._place("uploads", name) for name in over[:MOST]])

    async def _remove_prepared(self) -> None:
        """Deletes prepared data that no job has used for `prepared_days`: token ids and scores of the reference model.

        An attempt (run of a job on Ray) notes its use when it begins. So data stay while their project has an attempt
        that began longer ago, and data without a note, which an earlier release made, while it has any attempt.
        """
        seconds = self._settings.prepared_days * 86_400
        running = select(Job.project_id, func.extract("epoch", func.now() - func.min(Attempt.created_at)))
        running = running.join(Attempt, Attempt.job_id == Job.id).where(Attempt.state != "ended")
        async with self._store.begin() as session:
            longest = {row[0]: row[1] for row in await session.execute(running.group_by(Job.project_id))}
        projects = await self._folders("prepared") if seconds else []
        old = []
        for project_id in projects:
            for name in await self._folders("prepared", project_id):
                ages = await self._ages("prepared", project_id, name)
                in_use = project_id in longest and (USED not in ages or longest[project_id] > seconds)
                if ages and min(ages.values()) > seconds and not in_use:
                    old.append(self._place("prepared", project_id, name))
        await _remove(old[:MOST])

    async def _remove_models(self) -> None:
        """Deletes the files of deleted models from storage. For a checkpoint's model, deletes all files of the
        checkpoint.

        The order is random, so that models whose files cannot be deleted do not block the deletion of other models.
        """
        place = func.coalesce(Checkpoint.uri, Model.source)
        left = select(Model.id, place).outerjoin(Checkpoint, Checkpoint.model_id == Model.id)
        left = left.where(Model.deleted_at.is_not(None), Model.removed_at.is_(None))
        async with self._store.begin() as session:
            models = (await session.execute(left.order_by(func.random()).limit(MOST))).all()
        gone = [model_id for model_id, uri in models if await remove_bytes(uri)]
        async with self._store.begin() as session:
            await session.execute(update(Model).where(Model.id.in_(gone)).values(removed_at=func.now()))

    def _place(self, *names: str) -> str:
        return storage.join(self._settings.storage_url, *names)

    async def _folders(self, *folder: str) -> list[str]:
        names: list[str] = await anyio.to_thread.run_sync(storage.list_folders, self._place(*folder))
        return names

    async def _ages(self, *folder: str) -> dict[str, float]:
        """Returns the names of the files in a folder of the storage, each with the seconds since the file was written.

        `folder` holds the parts of the folder's path below the storage URL.
        """
        return dict(await anyio.to_thread.run_sync(storage.list_ages, self._place(*folder)))

    async def _move(self, name: str, folder: str, target: str) -> None:
        log.warning("Moving the file %s from %s to %s in storage", name, folder, target)
        await anyio.to_thread.run_sync(storage.move, self._place(folder, name), self._place(target, name))


def _among(column: InstrumentedAttribute[str], names: list[str]) -> ColumnElement[bool]:
    """Returns the SQL condition that the column has one of the values `names`. (SQLAlchemy's own `in_` takes at most
    65,535 values.)"""
    return column == any_(literal(names, ARRAY(Text)))


async def _remove(uris: list[str]) -> None:
    if uris:
        log.info("Removing %s from storage, and %d more", uris[0], len(uris) - 1)
    for uri in uris:
        await remove_bytes(uri)
        await asyncio.sleep(0)


async def stop_orphans(store: Store, ray_api: RayApi) -> list[str]:
    """Stops Ray jobs that still run although their attempts (runs of fine-tuning jobs) have ended. Returns the
    submission ids of these Ray jobs.

    Such a Ray job started late or ignored a request to stop. Ray jobs that this database does not know belong to
    another service, and are left alone.
    """
    running = [attempt for attempt in map(_attempt_of, await ray_api.live_submissions()) if attempt]
    async with store.begin() as session:
        orphans = await _ended(session, running)
    return [submission_id for submission_id in orphans if await ray_api.try_to_stop(submission_id)]


def _attempt_of(submission_id: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"(ftjob-[0-9a-f]+)-([0-9]+)", submission_id)
    return (match[1], int(match[2])) if match else None


async def _ended(session: AsyncSession, running: list[tuple[str, int]]) -> list[str]:
    query = select(Attempt).where(tuple_(Attempt.job_id, Attempt.number).in_(running))
    attempts = await session.scalars(query.where(Attempt.ended_at < func.now() - EXIT_GRACE))
    return [attempt.submission_id for attempt in attempts]

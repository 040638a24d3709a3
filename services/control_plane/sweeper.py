"""Removes what nobody needs any more. Runs beside the reconciler, in the control plane that holds its lease.

Every sweep may be done twice, or at once by two, without harm; each does a bounded amount, and the next goes on.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import anyio.to_thread
import httpx
from sqlalchemy import delete, func, select
from sqlalchemy.exc import SQLAlchemyError

from services import storage
from services.control_plane import datasets, files, once, uploads
from services.control_plane.launcher import Launcher
from services.control_plane.orphans import stop_orphans
from services.control_plane.sender import give_up_old
from services.control_plane.settings import Settings
from services.control_plane.store import Store
from services.control_plane.tables import File, Lease, Outbound, Upload

log = logging.getLogger(__name__)

MOST = 100  # rows, or files in storage, that one sweep removes
OUTBOX_KEPT = timedelta(days=30)
GRACE_SECONDS = 86_400  # an older file that no row names is not about to get one


class Sweeper:
    """Each sweep, and how often it is due, in seconds. What a control plane has not swept yet is due at once."""

    def __init__(self, store: Store, launcher: Launcher, settings: Settings) -> None:
        self._store, self._launcher, self._settings = store, launcher, settings
        self._sweeps: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (30, self._expire_files),
            (30, self._expire_uploads),
            (60, self._stop_orphans),
            (600, self._forget),
            (3600, self._remove_orphans),
            (3600, self._remove_parts),
        ]
        self._swept = [float("-inf")] * len(self._sweeps)

    async def sweep(self) -> None:
        """All that are due; what fails is logged, and tried again when it is due again."""
        for number, (seconds, sweep) in enumerate(self._sweeps):
            if time.monotonic() - self._swept[number] < seconds:
                continue
            self._swept[number] = time.monotonic()
            try:
                await sweep()
            except (SQLAlchemyError, httpx.HTTPError, OSError) as error:
                log.warning("A sweep failed and is tried again: %s", error)

    async def _expire_files(self) -> None:
        async with self._store.begin() as session:
            uris = await files.expire(session, MOST)
        await _remove(uris)

    async def _expire_uploads(self) -> None:
        async with self._store.begin() as session:
            folders = await uploads.expire(session, MOST, self._settings)
        await _remove(folders)

    async def _stop_orphans(self) -> None:
        for submission_id in await stop_orphans(self._store, self._launcher):
            log.warning("Stopped %s, whose attempt has ended", submission_id)
        for submission_id in await datasets.stop_late(self._store, self._launcher):
            log.warning("Stopped %s, which checked a file for too long", submission_id)

    async def _forget(self) -> None:
        sent = delete(Outbound).where(Outbound.due_at.is_(None), Outbound.created_at < func.now() - OUTBOX_KEPT)
        async with self._store.begin() as session:
            await once.forget_old(session)
            await session.execute(delete(Lease).where(Lease.expires_at < func.now() - timedelta(days=1)))
            await session.execute(sent)
            await give_up_old(session)
            checks = await datasets.forget_old(session, MOST)
        await _remove(checks)

    async def _remove_orphans(self) -> None:
        """Bytes of files that were deleted, or whose row was never written."""
        folder = storage.join(self._settings.storage_url, "files")
        listed = await anyio.to_thread.run_sync(storage.list_ages, folder)
        old = [name for name, age in listed if age > GRACE_SECONDS]
        async with self._store.begin() as session:
            known = set(await session.scalars(select(File.id).where(File.deleted_at.is_(None))))
        await _remove([storage.join(folder, name) for name in old if name not in known][:MOST])

    async def _remove_parts(self) -> None:
        """Parts of uploads that have ended."""
        folder = storage.join(self._settings.storage_url, "uploads")
        listed = await anyio.to_thread.run_sync(storage.list_uris, folder)
        async with self._store.begin() as session:
            pending = set(await session.scalars(select(Upload.id).where(Upload.state == "pending")))
        await _remove([uri for uri in listed if uri.rsplit("/", 1)[-1] not in pending][:MOST])


async def _remove(uris: list[str]) -> None:
    if uris:
        log.info("Removing %s from storage, and %d more", uris[0], len(uris) - 1)
    for uri in uris:
        await files.remove_bytes(uri)
        await asyncio.sleep(0)

"""Files: bytes in storage, and the rows that name them. What no row names is removed from storage in time."""

import hashlib
import logging
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, BinaryIO, cast

import anyio.to_thread
from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from services import outbound, storage
from services.contract import Reading
from services.control_plane.core.errors import InvalidRequest, NotFound, OverQuota
from services.control_plane.core.removal import remove_bytes
from services.control_plane.core.tables import TERMINAL, File, Job, Project
from services.control_plane.core.telemetry import UPLOADED_BYTES
from services.control_plane.settings import Settings
from services.control_plane.tenants import quotas
from services.uri import InvalidUri, admitted, is_folder

log = logging.getLogger(__name__)

TRAINING = "fine-tune"
RESULTS = "fine-tune-results"
NEEDED = ("training_file", "validation_file")  # fields of a job's spec that name files
LONGEST_NAME = 255
SHORTEST_LIFE, LONGEST_LIFE = 3600, 2_592_000  # seconds that a file may be given


# --- bytes -----------------------------------------------------------------------------------


class Digesting:
    """A source that is digested while it is read."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self.num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self.sha256.update(data)
        self.md5.update(data)
        self.num_bytes += len(data)
        return data


@dataclass
class Stored:
    """Bytes in storage."""

    id: str
    uri: str
    num_bytes: int
    sha256: str
    md5: str
    named: bool = False  # by a row


async def store(source: BinaryIO, folder: str, prefix: str) -> Stored:
    """Copies what is left of `source` into a new file of the folder."""
    name = prefix + secrets.token_hex(12)
    uri = storage.join(folder, name)
    digesting = Digesting(source)
    await anyio.to_thread.run_sync(storage.write_stream, uri, cast(BinaryIO, digesting))
    return Stored(name, uri, digesting.num_bytes, digesting.sha256.hexdigest(), digesting.md5.hexdigest())


async def store_file(source: BinaryIO, settings: Settings) -> Stored:
    """As the bytes of a file; the caller adds its row."""
    return await store(source, storage.join(settings.storage_url, "files"), "file-")


@asynccontextmanager
async def removed_unless_named(stored: Stored) -> AsyncIterator[None]:
    """Where what follows names them in no row, the bytes are removed."""
    try:
        yield
    finally:
        if not stored.named:
            await remove_bytes(stored.uri)


def clean_name(name: str, param: str) -> str:
    """The last part of a path, as RFC 7578 wants it. It names no file here; clients may store under it."""
    name = re.split(r"[/\\]", name)[-1]
    if name in ("", ".", "..") or len(name) > LONGEST_NAME or not name.isprintable():
        shown = "".join(c if c.isprintable() else "\ufffd" for c in name[:40])
        message = f"The file name '{shown}' must be 1 to {LONGEST_NAME} printable characters, and not '.' or '..'."
        raise InvalidRequest(message, param=param)
    return name


# --- rows ------------------------------------------------------------------------------------


async def add(
    session: AsyncSession,
    stored: Stored,
    *,
    filename: str,
    purpose: str,
    project_id: str,
    life_seconds: int | None = None,
    report: dict[str, Any] | None = None,
    reading: Reading | None = None,
) -> File:
    """The row that names the bytes. A training file without a report is checked in the background."""
    now = await session.scalar(select(func.clock_timestamp()))
    assert now is not None
    row = File(
        id=stored.id,
        created_at=now,
        expires_at=now + timedelta(seconds=life_seconds) if life_seconds else None,
        filename=filename,
        purpose=purpose,
        project_id=project_id,
        num_bytes=stored.num_bytes,
        sha256=stored.sha256,
        uri=stored.uri,
        report=report,
        reading=reading and reading.model_dump(),
    )
    session.add(row)
    await session.flush()
    stored.named = True
    if purpose == TRAINING:
        UPLOADED_BYTES.inc(stored.num_bytes)
    return row


async def find(session: AsyncSession, file_id: str, *, param: str = "file_id") -> File:
    """The file by its id; NotFound where there is none, or no longer."""
    return await _find(session, file_id, param, lock=None)


async def find_checked(session: AsyncSession, file_id: str, *, param: str) -> File:
    """A training file whose rows are checked. It stays until the caller's transaction ends, by a lock."""
    row = await _find(session, file_id, param, lock="share")
    if row.purpose != TRAINING:
        message = f"{row.id} has purpose '{row.purpose}'; {param} needs one uploaded with '{TRAINING}'."
    elif row.refusal:
        message = f"{row.id} cannot be used: {row.refusal}"
    elif row.report is None:
        message = f"{row.id} is still being checked; wait for it with client.files.wait_for_processing('{row.id}')."
    else:
        return row
    raise InvalidRequest(message, param=param, code=f"invalid_{param}")


async def _find(session: AsyncSession, file_id: str, param: str, lock: str | None) -> File:
    query = select(File).where(File.id == file_id, File.alive())
    if lock is not None:
        query = query.with_for_update(read=lock == "share")
    if (row := await session.scalar(query)) is None:
        raise NotFound(f"No such File object: {file_id}", param=param, code="file_not_found")
    return row


async def remove(session: AsyncSession, file_id: str) -> File:
    """Forget the file, unless a job still needs it. The caller deletes its bytes after the commit."""
    row = await _find(session, file_id, "file_id", lock="update")
    if job_id := (await needed_by(session, [file_id])).get(file_id):
        raise InvalidRequest(f"{file_id} is needed by {job_id}, which has not ended; cancel the job first.")
    row.deleted_at = func.clock_timestamp()
    return row


async def expire(session: AsyncSession, most: int) -> list[str]:
    """Forget expired files that no live job needs. Returns where the bytes lie, to be deleted after the commit."""
    over = select(File).where(File.deleted_at.is_(None), File.expires_at <= func.clock_timestamp())
    for name in NEEDED:  # else those that are needed for long would hide the others
        over = over.where(File.id.not_in(select(Job.spec[name].astext).where(_lives(name))))
    rows = list(await session.scalars(over.limit(most).with_for_update(skip_locked=True)))
    needed = await needed_by(session, [row.id for row in rows])  # a job may have taken one meanwhile
    free = [row for row in rows if row.id not in needed]
    for row in free:
        row.deleted_at = func.clock_timestamp()
    return [row.uri for row in free]


async def needed_by(session: AsyncSession, file_ids: list[str]) -> dict[str, str]:
    """Of these files the ones that a live job trains on or validates with, and such a job.

    Asked after the files are locked, so that no job takes one meanwhile.
    """
    needed: dict[str, str] = {}
    for name in NEEDED:
        file_id = Job.spec[name].astext
        query = select(file_id, Job.id).where(_lives(name), file_id.in_(file_ids))
        needed |= {row[0]: row[1] for row in await session.execute(query)}
    return needed


def _lives(name: str) -> ColumnElement[bool]:
    """Jobs that have not ended and name a file as `name`."""
    return and_(Job.observed.not_in(TERMINAL), Job.spec[name].astext.is_not(None))


async def reserve(session: AsyncSession, project_id: str, num_bytes: int, *, param: str) -> None:
    """Raises OverQuota if the project may not have so many bytes more. Until the commit no other file is admitted."""
    limit = select(Project.max_bytes).where(Project.id == project_id)
    most = await session.scalar(limit.with_for_update(key_share=True))
    if most is None:
        return
    used = await quotas.num_bytes(session, project_id)
    if used + num_bytes > most:
        message = (
            f"The project's files have {used} of {most} bytes, and {num_bytes} more do not fit; "
            "delete files, or have the project's max_bytes raised."
        )
        raise OverQuota(message, param=param)


# --- files that are the user's own ------------------------------------------------------------


async def check_uri(uri: str, settings: Settings) -> None:
    """What can be told of a user's URI before anything is connected to. Raises InvalidRequest."""
    try:
        await anyio.to_thread.run_sync(_check_uri, uri, settings)
    except InvalidUri as error:
        raise InvalidRequest(str(error), param="x_raydpo.dataset", code="invalid_training_file") from None


def _check_uri(uri: str, settings: Settings) -> None:
    place = admitted(uri, settings.dataset_uris)
    if place.startswith(("https:", "http:")):
        outbound.check_literal(place, settings.dataset_uris)
    if place.startswith("file:") and not is_folder(uri) and storage.version(place) is None:
        raise InvalidUri(f"{uri} is no file here; one for a folder ends with '/'.")

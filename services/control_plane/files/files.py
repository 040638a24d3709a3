"""Files: bytes in storage, and database rows that name them. The sweeper removes bytes that no row names."""

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
from sqlalchemy import ColumnElement, and_, func, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from services import outbound, storage
from services.contract import Reading
from services.control_plane.core.errors import InvalidRequest, NotFound, OverQuota
from services.control_plane.core.removal import remove_bytes
from services.control_plane.core.tables import TERMINAL, UNCHECKED, File, Job, Project
from services.control_plane.core.telemetry import UPLOADED_BYTES
from services.control_plane.settings import Settings
from services.control_plane.tenants import quotas
from services.uri import InvalidUri, admitted, is_folder

log = logging.getLogger(__name__)

TRAINING = "fine-tune"
RESULTS = "fine-tune-results"
NEEDED = ("training_file", "validation_file")  # fields of a job's spec that name files
LONGEST_NAME = 255
SHORTEST_LIFE, LONGEST_LIFE = 3600, 2_592_000  # seconds, of `expires_after`


# --- bytes -----------------------------------------------------------------------------------


class Digesting:
    """Reads from a source, and computes digests of what was read."""

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
    """Bytes that were written to storage."""

    id: str
    uri: str
    num_bytes: int
    sha256: str
    md5: str
    named: bool = False  # whether a database row names the bytes


async def store(source: BinaryIO, folder: str, prefix: str) -> Stored:
    """Copies the rest of `source` into a new file of the folder in storage."""
    name = prefix + secrets.token_hex(12)
    uri = storage.join(folder, name)
    digesting = Digesting(source)
    await anyio.to_thread.run_sync(storage.write_stream, uri, cast(BinaryIO, digesting))
    return Stored(name, uri, digesting.num_bytes, digesting.sha256.hexdigest(), digesting.md5.hexdigest())


async def store_file(source: BinaryIO, settings: Settings) -> Stored:
    """Copies `source` to where files are stored. The caller adds the row that names it."""
    return await store(source, storage.join(settings.storage_url, "files"), "file-")


@asynccontextmanager
async def removed_unless_named(stored: Stored) -> AsyncIterator[None]:
    """Removes the bytes at the end of the block unless a row names them by then."""
    try:
        yield
    finally:
        if not stored.named:
            await remove_bytes(stored.uri)


def clean_name(name: str, param: str) -> str:
    """Returns the last part of a path, as RFC 7578 wants it. Clients may save the file under this name."""
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
    """Adds the row of a file. A training file without a report is checked in the background."""
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
    """Returns the file. Raises NotFound if there is none, or it was deleted or has expired."""
    return await _find(session, file_id, param, lock=None)


async def find_checked(session: AsyncSession, file_id: str, *, param: str) -> File:
    """Returns a training file whose rows have been checked. A lock keeps it until the transaction ends."""
    row = await _find(session, file_id, param, lock="share")
    if row.purpose != TRAINING:
        message = f"{row.id} has purpose '{row.purpose}'; {param} needs one uploaded with '{TRAINING}'."
    elif row.refusal:
        message = f"{row.id} cannot be used: {row.refusal}"
    elif row.report is None:
        where = await _check_in_words(session, row)
        message = f"{row.id} {where}; wait for it with client.files.wait_for_processing('{row.id}')."
    else:
        return row
    raise InvalidRequest(message, param=param, code=f"invalid_{param}")


async def _check_in_words(session: AsyncSession, row: File) -> str:
    """Says how far the background check of the file is. It counts only files of the same project before it."""
    if row.num_checked is not None:
        return f"is still being checked: {row.num_checked} of {row.num_bytes} bytes are read"
    older = tuple_(File.created_at, File.id) < (row.created_at, row.id)
    earlier = select(func.count()).select_from(File).where(text(UNCHECKED), File.project_id == row.project_id, older)
    before = await session.scalar(earlier)
    return f"is still to be checked: {before} {'file' if before == 1 else 'files'} of the project before it"


async def _find(session: AsyncSession, file_id: str, param: str, lock: str | None) -> File:
    query = select(File).where(File.id == file_id, File.alive())
    if lock is not None:
        query = query.with_for_update(read=lock == "share")
    if (row := await session.scalar(query)) is None:
        raise NotFound(f"No such File object: {file_id}", param=param, code="file_not_found")
    return row


async def remove(session: AsyncSession, file_id: str) -> File:
    """Marks the file as deleted, unless a job still needs it. The caller deletes its bytes after the commit."""
    row = await _find(session, file_id, "file_id", lock="update")
    if job_id := (await needed_by(session, [file_id])).get(file_id):
        raise InvalidRequest(f"{file_id} is needed by {job_id}, which has not ended; cancel the job first.")
    row.deleted_at = func.clock_timestamp()
    return row


async def expire(session: AsyncSession, most: int) -> list[str]:
    """Marks expired files that no live job needs as deleted. Returns their URIs, to be deleted after the commit."""
    over = select(File).where(File.deleted_at.is_(None), File.expires_at <= func.clock_timestamp())
    for name in NEEDED:  # otherwise files that jobs need for long would fill the first `most`
        over = over.where(File.id.not_in(select(Job.spec[name].astext).where(_lives(name))))
    rows = list(await session.scalars(over.limit(most).with_for_update(skip_locked=True)))
    needed = await needed_by(session, [row.id for row in rows])  # a job may have taken one before it was locked
    free = [row for row in rows if row.id not in needed]
    for row in free:
        row.deleted_at = func.clock_timestamp()
    return [row.uri for row in free]


async def needed_by(session: AsyncSession, file_ids: list[str]) -> dict[str, str]:
    """Returns those of the files that a live job trains on or validates with, each with such a job's id.

    Lock the files first, so that no job takes one meanwhile.
    """
    needed: dict[str, str] = {}
    for name in NEEDED:
        file_id = Job.spec[name].astext
        query = select(file_id, Job.id).where(_lives(name), file_id.in_(file_ids))
        needed |= {row[0]: row[1] for row in await session.execute(query)}
    return needed


def _lives(name: str) -> ColumnElement[bool]:
    """The condition that a job has not ended and names a file in the field `name`."""
    return and_(Job.observed.not_in(TERMINAL), Job.spec[name].astext.is_not(None))


async def reserve(session: AsyncSession, project_id: str, num_bytes: int, *, param: str) -> None:
    """Raises OverQuota if the project may not have `num_bytes` more. Locks the project, so that files come in turn."""
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


# --- files that are not uploaded --------------------------------------------------------------


async def check_uri(uri: str, settings: Settings) -> None:
    """Checks what can be checked of a user's URI without connecting anywhere. Raises InvalidRequest."""
    try:
        await anyio.to_thread.run_sync(_check_uri, uri, settings)
    except InvalidUri as error:
        raise InvalidRequest(str(error), param="x_raydpo.dataset", code="invalid_training_file") from None


def _check_uri(uri: str, settings: Settings) -> None:
    place = admitted(uri, settings.dataset_uris)
    if place.startswith(("https:", "http:")):
        outbound.check_literal(place, settings.dataset_uris)
    if place.startswith("file:") and not is_folder(uri) and storage.version(place) is None:
        raise InvalidUri(f"{uri} is no file on this machine; the URI of a folder must end with '/'.")

"""Stores files. A file is its bytes in storage, and a row of the database that names the bytes.

A regular cleanup deletes bytes that no row names.
"""

import hashlib
import logging
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, BinaryIO, cast

import anyio.to_thread
from sqlalchemy import Select, Text, column, func, select, text, true, tuple_
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
SHORTEST_LIFE, LONGEST_LIFE = 3600, 2_592_000  # limits of `expires_after`, in seconds


# --- bytes -----------------------------------------------------------------------------------


class Digesting:
    """A reader that returns the bytes of `source`, counts them, and computes their SHA-256 and MD5."""

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
    """A new file in storage: its URI, its size and its digests."""

    id: str
    uri: str
    num_bytes: int
    sha256: str
    md5: str
    named: bool = False  # whether a database row names the bytes


async def store(source: BinaryIO, folder: str, prefix: str) -> Stored:
    """Copies the remaining bytes of `source` into a new file in the storage folder `folder`. Returns the new file.

    The file's name is `prefix` and random digits.
    """
    name = prefix + secrets.token_hex(12)
    uri = storage.join(folder, name)
    digesting = Digesting(source)
    await anyio.to_thread.run_sync(storage.write_stream, uri, cast(BinaryIO, digesting))
    return Stored(name, uri, digesting.num_bytes, digesting.sha256.hexdigest(), digesting.md5.hexdigest())


async def store_file(source: BinaryIO, settings: Settings) -> Stored:
    """Copies the remaining bytes of `source` into a new file in the storage's folder for files. Returns the new file.

    The caller must then add the file's row to the database.
    """
    return await store(source, storage.join(settings.storage_url, "files"), "file-")


@asynccontextmanager
async def removed_unless_named(stored: Stored) -> AsyncIterator[None]:
    """Deletes the bytes of `stored` from storage at the end of the `with` block, unless a row of the database names
    them then."""
    try:
        yield
    finally:
        if not stored.named:
            await remove_bytes(stored.uri)


def clean_name(name: str, param: str) -> str:
    """Returns the name of an uploaded file without folders, as RFC 7578 requires. Clients may save the file under this
    name.

    `param` is the request's field that holds the name. Raises InvalidRequest if the name is empty, too long or not
    printable.
    """
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
    """Adds the database row of a file whose bytes are in storage, and returns the row.

    `stored` says where the bytes are, and `filename` is the name that the user sees. `purpose` says what the file is
    for, such as `fine-tune`. `project_id` is the project that owns the file. `report` is the report on the rows of a
    training file; if it is None, a background task checks the rows later. `reading` holds the options for reading the
    rows. The file expires after `life_seconds`, or never if `life_seconds` is None.
    """
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
    """Returns the file with this id. `param` is the request's field that names the file.

    Raises NotFound if the file does not exist, was deleted or has expired.
    """
    return await _find(session, file_id, param, lock=None)


async def find_training(session: AsyncSession, file_id: str, *, param: str) -> File:
    """Returns the training file with this id, locked against deletion until the transaction ends.

    `param` is the request's field that names the file. The rows of a large file may not have been checked yet. Raises
    NotFound if there is no such file, and InvalidRequest if the file is no training file, or the check refused the
    rows.
    """
    row = await _find(session, file_id, param, lock="share")
    if row.purpose != TRAINING:
        message = (
            f"{param} is {row.id}, which has the purpose '{row.purpose}'; name a file with the purpose '{TRAINING}'."
        )
        raise InvalidRequest(message, param=param, code=f"invalid_{param}")
    refuse_unusable(row, param)
    return row


def refuse_unusable(row: File, param: str) -> None:
    """Raises InvalidRequest if the check of the file's rows found that the file cannot be used.

    `param` is the request's field that names the file.
    """
    if row.refusal:
        raise InvalidRequest(f"The file {row.id} cannot be used: {row.refusal}", param=param, code=f"invalid_{param}")


async def find_checked(session: AsyncSession, file_id: str, *, param: str) -> File:
    """Returns the training file with this id, locked against deletion until the transaction ends. Its rows must have
    been checked.

    `param` is the request's field that names the file. Raises NotFound if there is no such file. Raises InvalidRequest
    if the file is no training file, its rows are not checked yet, or the check refused them.
    """
    row = await find_training(session, file_id, param=param)
    if row.report is None:
        where = await _check_in_words(session, row)
        message = f"The file {row.id} {where}; wait for the check with client.files.wait_for_processing('{row.id}')."
        raise InvalidRequest(message, param=param, code=f"invalid_{param}")
    return row


async def checks_awaited(session: AsyncSession, jobs: Sequence[Job]) -> dict[str, str]:
    """Returns which of these jobs must wait because the rows of one of their files are not checked yet.

    Maps the id of each such job to a text for its column `waits_for`, which says what the job waits for. A text stays
    the same until the check ends.
    """
    named = {file_id for job in jobs for name in NEEDED if (file_id := job.spec.get(name))}
    query = select(File.id, File.num_bytes).where(text(UNCHECKED), File.id.in_(named))
    sizes = {row.id: row.num_bytes for row in await session.execute(query)}
    return {
        job.id: (
            f"the check of its file {file_id} ({sizes[file_id]} bytes); "
            f"GET /v1/files/{file_id} says how far the check is"
        )
        for job in jobs
        for name in NEEDED
        if (file_id := job.spec.get(name)) in sizes
    }


async def _check_in_words(session: AsyncSession, row: File) -> str:
    """Returns the end of a sentence that says how far the background check of the file is, such as "is still being
    checked, 10 of 20 bytes so far".

    If the check has not begun, the text says how many older files of the same project are not checked yet.
    """
    if row.num_checked is not None:
        return f"is still being checked, {row.num_checked} of {row.num_bytes} bytes so far"
    older = tuple_(File.created_at, File.id) < (row.created_at, row.id)
    earlier = select(func.count()).select_from(File).where(text(UNCHECKED), File.project_id == row.project_id, older)
    before = await session.scalar(earlier)
    return (
        f"is not checked yet; {before} older {'file' if before == 1 else 'files'} of the project must be checked first"
    )


async def _find(session: AsyncSession, file_id: str, param: str, lock: str | None) -> File:
    query = select(File).where(File.id == file_id, File.alive())
    if lock is not None:
        query = query.with_for_update(read=lock == "share")
    if (row := await session.scalar(query)) is None:
        raise NotFound(
            f"No such File object: {file_id}. List the project's files for their ids.",
            param=param,
            code="file_not_found",
        )
    return row


async def remove(session: AsyncSession, file_id: str) -> File:
    """Marks the file as deleted, and returns its row. The caller must delete the file's bytes after the commit.

    Raises NotFound if there is no such file, and InvalidRequest if a job that has not ended needs the file.
    """
    row = await _find(session, file_id, "file_id", lock="update")
    if job_id := (await needed_by(session, [file_id])).get(file_id):
        raise InvalidRequest(
            f"The file {file_id} is needed by the job {job_id}, which has not ended; cancel the job first."
        )
    row.deleted_at = func.clock_timestamp()
    return row


async def expire(session: AsyncSession, most: int) -> list[str]:
    """Marks at most `most` expired files as deleted. Skips files that are needed by jobs that have not ended. Returns
    the URIs of the deleted files.

    The caller must delete the bytes at these URIs after the commit.
    """
    over = select(File).where(File.deleted_at.is_(None), File.expires_at <= func.clock_timestamp())
    for query in _needing():  # otherwise files that jobs need for a long time would fill the first `most` rows
        over = over.where(File.id.not_in(query.with_only_columns(query.selected_columns[0])))
    rows = list(await session.scalars(over.limit(most).with_for_update(skip_locked=True)))
    needed = await needed_by(session, [row.id for row in rows])  # a job may have taken a file before its lock
    free = [row for row in rows if row.id not in needed]
    for row in free:
        row.deleted_at = func.clock_timestamp()
    return [row.uri for row in free]


async def needed_by(session: AsyncSession, file_ids: list[str]) -> dict[str, str]:
    """Returns which of these files are needed by jobs that have not ended. Maps the id of each such file to the id of
    one such job.

    The caller must hold locks on the files, so that no new job can name one of them meanwhile.
    """
    needed: dict[str, str] = {}
    for query in _needing():
        named = query.where(query.selected_columns[0].in_(file_ids))
        needed |= {row[0]: row[1] for row in await session.execute(named)}
    return needed


def _needing() -> list[Select[Any]]:
    """Returns SQL queries for the ids of files that jobs need, each with the id of the job. The jobs have not ended,
    and name the file as their data, or as the prompts of an evaluation.
    """
    live = Job.observed.not_in(TERMINAL)
    queries = [select(Job.spec[name].astext, Job.id).where(live, Job.spec[name].astext.is_not(None)) for name in NEEDED]
    path = text("'$.evaluations.*.file'")
    prompts = func.jsonb_path_query(Job.spec, path).table_valued(column("file", Text)).render_derived()
    file_id = prompts.c.file.op("#>>", return_type=Text())(text("'{}'"))
    return [*queries, select(file_id, Job.id).select_from(Job).join(prompts, true()).where(live)]


async def reserve(session: AsyncSession, project_id: str, num_bytes: int, *, param: str) -> None:
    """Raises OverQuota if the project may not store `num_bytes` more bytes. `param` is the request's field that the
    error names.

    Locks the project's row until the transaction ends. So files that arrive at the same time are counted one after the
    other.
    """
    limit = select(Project.max_bytes).where(Project.id == project_id)
    most = await session.scalar(limit.with_for_update(key_share=True))
    if most is None:
        return
    used = await quotas.num_bytes(session, project_id)
    if used + num_bytes > most:
        message = (
            f"The project's files and feedback have {used} of at most {most} bytes, and {num_bytes} more do not fit; "
            "delete files, or ask an admin to raise the project's max_bytes."
        )
        raise OverQuota(message, param=param)


# --- files that are not uploaded --------------------------------------------------------------


async def check_uri(uri: str, settings: Settings) -> None:
    """Raises InvalidRequest if jobs may not train on the data at `uri`, which a user sent: the setting `dataset_uris`
    does not allow the URI, its host is a private IP address that the setting does not name, or it is a local file that
    does not exist. Connects to no other machine.
    """
    try:
        await anyio.to_thread.run_sync(_check_uri, uri, settings)
    except InvalidUri as error:
        raise InvalidRequest(str(error), param="x_raydpo.dataset", code="invalid_training_file") from None


def _check_uri(uri: str, settings: Settings) -> None:
    place = admitted(uri, settings.dataset_uris)
    if place.startswith(("https:", "http:")):
        outbound.check_literal(place, settings.dataset_uris)
    if place.startswith("file:") and not is_folder(uri) and storage.version(place) is None:
        raise InvalidUri(
            f"{uri} is not a file on the service's machine; correct the path, or end the URI of a folder with '/'."
        )

"""Files: every row is checked at the door, then the file goes to storage and its row to the database."""

import hashlib
import secrets
from dataclasses import asdict
from datetime import UTC, datetime
from io import BytesIO
from typing import BinaryIO

import anyio.to_thread
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.survey import survey
from services import outbound, storage
from services.containers import json_lines
from services.control_plane.errors import InvalidRequest, NotFound, TooLarge
from services.control_plane.settings import Settings
from services.control_plane.tables import TERMINAL, File, Job
from services.control_plane.telemetry import UPLOADED_BYTES
from services.uri import InvalidUri, admitted, is_folder

TRAINING = "fine-tune"
RESULTS = "fine-tune-results"


async def upload(source: BinaryIO, filename: str, settings: Settings) -> File:
    """Check and store a training file; the caller adds the row. Raises InvalidRequest naming the first bad line."""
    return await anyio.to_thread.run_sync(_upload, source, filename, settings)


def _upload(source: BinaryIO, filename: str, settings: Settings) -> File:
    num_bytes = source.seek(0, 2)
    if num_bytes > settings.max_upload_bytes:
        raise TooLarge(
            f"The file has {num_bytes} bytes; the limit is {settings.max_upload_bytes}. Split it into several files.",
            param="file",
        )
    report = survey(json_lines(source))
    if report.refusal:
        raise InvalidRequest(report.refusal, param="file", code="invalid_file_format")
    source.seek(0)
    UPLOADED_BYTES.inc(num_bytes)
    return _store(source, num_bytes, filename, TRAINING, settings, report=asdict(report))


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


async def store_results(data: bytes, filename: str, settings: Settings) -> File:
    """Store a file that the service made; the caller adds the row."""
    return await anyio.to_thread.run_sync(
        lambda: _store(BytesIO(data), len(data), filename, RESULTS, settings, report=None)
    )


def _store(
    source: BinaryIO, num_bytes: int, filename: str, purpose: str, settings: Settings, report: dict[str, object] | None
) -> File:
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
    source.seek(0)
    file_id = f"file-{secrets.token_hex(12)}"
    uri = storage.join(settings.storage_url, "files", file_id)
    storage.write_stream(uri, source)
    return File(
        id=file_id,
        filename=filename,
        purpose=purpose,
        num_bytes=num_bytes,
        sha256=digest.hexdigest(),
        uri=uri,
        report=report,
        created_at=datetime.now(UTC),
    )


async def find(session: AsyncSession, file_id: str, *, param: str | None = None) -> File:
    """The file by its id; NotFound where there is none or it was deleted."""
    row = await session.get(File, file_id)
    if row is None or row.deleted_at is not None:
        raise NotFound(f"No such File object: {file_id}", param=param or "file_id", code="file_not_found")
    return row


async def remove(session: AsyncSession, file_id: str) -> File:
    """Forget the file, unless a job still needs it. The caller deletes its bytes after the commit."""
    row = await find(session, file_id)
    named = [Job.spec[name].astext == file_id for name in ("training_file", "validation_file")]
    using = select(Job.id).where(Job.observed.not_in(TERMINAL), or_(*named))
    if (job_id := await session.scalar(using.limit(1))) is not None:
        raise InvalidRequest(f"{file_id} is needed by {job_id}, which has not ended; cancel the job first.")
    row.deleted_at = datetime.now(UTC)
    return row

"""Handles uploads: files that arrive in parts.

Each part is a file in storage until the upload is completed, cancelled or expired.
"""

import io
import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, BinaryIO, cast

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from services import storage
from services.control_plane.core.errors import InvalidRequest, NotFound
from services.control_plane.core.store import wait_long
from services.control_plane.core.tables import File, Upload, UploadPart, reading_of
from services.control_plane.files import files, row_check
from services.control_plane.files.files import Stored
from services.control_plane.settings import Settings

PENDING_FOR = timedelta(hours=1)
PART_BYTES = 64 * 2**20  # the part size of OpenAI's client
MOST_PARTS = 10_000


def folder(upload_id: str, settings: Settings) -> str:
    """Returns the URI of the storage folder that holds the parts of an upload."""
    return storage.join(settings.storage_url, "uploads", upload_id)


async def begin(session: AsyncSession, wanted: dict[str, Any], project_id: str) -> Upload:
    """Adds the row of a new upload with the columns `wanted`, and returns the row.

    The upload's bytes count towards the project's limit from now on. Raises OverQuota if the bytes would exceed the
    limit.
    """
    await files.reserve(session, project_id, wanted["num_bytes"], param="bytes")
    now = await session.scalar(select(func.clock_timestamp()))
    assert now is not None
    upload_id = f"upload_{secrets.token_hex(12)}"
    row = Upload(id=upload_id, created_at=now, expires_at=now + PENDING_FOR, project_id=project_id, **wanted)
    session.add(row)
    await session.flush()
    return row


async def find(session: AsyncSession, upload_id: str, *, lock: bool = False) -> tuple[Upload, str]:
    """Returns the upload with this id, and its state, such as `pending` or, by the database's clock, `expired`.

    If `lock` is true, nobody else can complete, cancel or expire the upload before this transaction ends. Raises
    NotFound if there is no such upload.
    """
    query = select(Upload).where(Upload.id == upload_id)
    if lock:
        query = query.with_for_update(key_share=True)  # parts that name the upload may still be added
    if (row := await session.scalar(query)) is None:
        raise NotFound(
            f"No such Upload object: {upload_id}. Create a new upload.", param="upload_id", code="upload_not_found"
        )
    over = row.state == "pending" and await session.scalar(select(func.clock_timestamp() > row.expires_at))
    return row, "expired" if over else row.state


async def file_of(session: AsyncSession, row: Upload) -> File | None:
    """Returns the file that was made from the upload. Returns None if the file does not exist, was deleted or has
    expired."""
    return await session.scalar(select(File).where(File.id == row.file_id, File.alive()))


def check_pending(row: Upload, state: str, wish: str) -> None:
    """Raises InvalidRequest unless the upload is pending. `state` is the upload's state. `wish` is a participle for the
    message, such as "cancelled".
    """
    if state != "pending":
        raise InvalidRequest(
            f"The upload {row.id} is {state} and cannot be {wish}; create another upload.", param="upload_id"
        )


async def add_part(session: AsyncSession, upload_id: str, stored: Stored) -> UploadPart:
    """Adds the row of a part of the upload, and returns the row. `stored` says where the part's bytes are in storage.

    Raises InvalidRequest if the upload has ended, or would have too many bytes or parts.
    """
    one_at_a_time = func.pg_advisory_xact_lock(func.hashtextextended(upload_id, 0))
    await session.execute(select(one_at_a_time))
    row, state = await find(session, upload_id)
    check_pending(row, state, "added to")
    sums = select(func.count(), func.sum(UploadPart.num_bytes)).where(UploadPart.upload_id == upload_id)
    count, sent = (await session.execute(sums)).one()
    total, most = int(sent or 0) + stored.num_bytes, 2 * row.num_bytes  # so that each part may be sent twice
    if total > most:
        message = (
            f"The upload's parts have {total} bytes, more than twice its size of {row.num_bytes}; "
            "cancel the upload and create another one."
        )
        raise InvalidRequest(message, param="data")
    if count >= MOST_PARTS:
        raise InvalidRequest(
            f"The upload has {count} parts, which is the limit; begin a new upload with larger parts.", param="data"
        )
    part = UploadPart(id=stored.id, upload_id=upload_id, num_bytes=stored.num_bytes, uri=stored.uri)
    session.add(part)
    await session.flush()
    await session.refresh(part)
    stored.named = True
    return part


async def complete(
    session: AsyncSession, upload_id: str, part_ids: Sequence[str], md5: str | None, settings: Settings
) -> tuple[Upload, File | None]:
    """Joins the parts of the upload to a file, and checks the rows of this file. Returns the upload and the file.

    The file has the parts in the order of `part_ids`; `md5` is the expected digest of the file, None if the client sent
    none. Locks the upload until the transaction ends, so that a second call waits and returns the file of the first
    call. Raises NotFound if there is no such upload. Raises InvalidRequest if the upload was cancelled or has expired,
    or if the parts, the digest or the rows are wrong.
    """
    row, state = await find(session, upload_id, lock=True)
    if state == "completed":
        return row, await file_of(session, row)
    check_pending(row, state, "completed")
    parts = await _in_order(session, row, part_ids)
    reading = reading_of(row)
    await wait_long(session)
    try:
        stored = await files.store_file(cast(BinaryIO, Joined(parts)), settings)
    except FileNotFoundError:
        message = (
            f"A part of the upload {row.id} is missing in storage; create another upload and send all parts again."
        )
        raise InvalidRequest(message, param="part_ids") from None
    async with files.removed_unless_named(stored):
        if md5 is not None and stored.md5 != md5.lower():
            message = (
                f"md5 is {md5:.64}, but the parts together have the MD5 {stored.md5}; send the damaged parts again."
            )
            raise InvalidRequest(message, param="md5")
        report = await row_check.report_of(stored, reading, param="part_ids", project_id=row.project_id)
        file = await files.add(
            session,
            stored,
            filename=row.filename,
            purpose=row.purpose,
            project_id=row.project_id,
            life_seconds=row.file_seconds,
            report=report,
            reading=reading,
        )
    row.state, row.file_id = "completed", file.id
    await session.flush()
    return row, file


async def cancel(session: AsyncSession, upload_id: str) -> Upload:
    """Marks the upload as cancelled, and returns it. Cancelling an upload twice is harmless."""
    row, state = await find(session, upload_id, lock=True)
    if state != "cancelled":
        check_pending(row, state, "cancelled")
        row.state = "cancelled"
    return row


async def expire(session: AsyncSession, most: int, settings: Settings) -> list[str]:
    """Finds pending uploads that were not completed before their `expires_at`, at most `most` of them, and sets their
    state to "expired". Returns the folders in storage that hold the parts of these uploads.

    Skips uploads that are being completed. The caller must delete the folders after the commit.
    """
    over = select(Upload).where(Upload.state == "pending", Upload.expires_at <= func.clock_timestamp())
    rows = list(await session.scalars(over.limit(most).with_for_update(skip_locked=True, key_share=True)))
    for row in rows:
        row.state = "expired"
    return [folder(row.id, settings) for row in rows]


async def _in_order(session: AsyncSession, row: Upload, part_ids: Sequence[str]) -> list[UploadPart]:
    """Returns the upload's parts in the order of `part_ids`. The same id may come twice, because a client that sends
    two equal parts may get the same id for both.

    Raises InvalidRequest for an unknown id, or if the parts together do not have as many bytes as the upload.
    """
    query = select(UploadPart).where(UploadPart.upload_id == row.id)
    parts = {part.id: part for part in await session.scalars(query)}
    for part_id in part_ids:
        if part_id not in parts:
            raise InvalidRequest(
                f"part_ids names {part_id:.80}, which is not a part of the upload {row.id}; send ids of its parts.",
                param="part_ids",
            )
    ordered = [parts[part_id] for part_id in part_ids]
    if (total := sum(part.num_bytes for part in ordered)) != row.num_bytes:
        sizes = f"The parts have {total} bytes, but the upload was created for {row.num_bytes}"
        message = f"{sizes}; send the ids of parts that have as many bytes together."
        raise InvalidRequest(message, param="part_ids")
    return ordered


class Joined(io.RawIOBase):
    """A binary stream that reads the parts of an upload one after the other, as one file."""

    def __init__(self, parts: Sequence[UploadPart]) -> None:
        self._left = [part.uri for part in reversed(parts)]
        self._open: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._open or self._left:
            self._open = self._open or storage.open_input(self._left.pop())
            if taken := self._open.readinto(buffer):  # type: ignore[attr-defined]
                return int(taken)
            self._open.close()
            self._open = None
        return 0

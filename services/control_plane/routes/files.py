"""/v1/files"""

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Response, UploadFile
from fastapi import Form as FormField
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services import storage
from services.control_plane import files
from services.control_plane.errors import InvalidRequest
from services.control_plane.objects import deleted, file_object, listing
from services.control_plane.routes.dependencies import OncePart, SettingsPart, StorePart
from services.control_plane.store import page
from services.control_plane.tables import File

router = APIRouter(prefix="/files")

CHUNK = 1 << 20


@router.post("")
async def create(
    once: OncePart,
    settings: SettingsPart,
    file: UploadFile,
    purpose: Annotated[str, FormField()],
    expires_anchor: Annotated[str | None, FormField(alias="expires_after[anchor]")] = None,
    expires_seconds: Annotated[str | None, FormField(alias="expires_after[seconds]")] = None,
) -> Response:
    """Check every row and store the file; a bad row is refused by its line."""
    if purpose != files.TRAINING:
        message = f"purpose '{purpose}' is not supported; it must be '{files.TRAINING}'."
        raise InvalidRequest(message, param="purpose", code="unsupported_value")
    if expires_anchor or expires_seconds:
        message = "expires_after is not supported; leave it out and delete the file when it is no longer needed."
        raise InvalidRequest(message, param="expires_after", code="unsupported_value")
    row = await files.upload(file.file, file.filename or "upload.jsonl", settings)
    kept = False

    async def keep(session: AsyncSession) -> dict[str, Any]:
        nonlocal kept
        session.add(row)
        await session.flush()
        kept = True
        return file_object(row)

    try:
        return await once.act(keep, content=f"{row.filename}\n{row.purpose}\n{row.num_bytes}\n{row.sha256}")
    finally:
        if not kept:
            await anyio.to_thread.run_sync(storage.delete, row.uri)


@router.get("")
async def list_files(
    store: StorePart,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    query = select(File).where(File.deleted_at.is_(None))
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    async with store.begin() as session:
        keys = [File.created_at, File.id]
        rows, more = await page(
            session, query, keys, cursor=File.id, after=after, limit=limit, descending=order == "desc"
        )
    return listing([file_object(row) for row in rows], more)


@router.get("/{file_id}")
async def retrieve(store: StorePart, file_id: str) -> dict[str, Any]:
    async with store.begin() as session:
        return file_object(await files.find(session, file_id))


@router.get("/{file_id}/content")
async def content(store: StorePart, file_id: str) -> StreamingResponse:
    async with store.begin() as session:
        row = await files.find(session, file_id)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", row.filename)
    headers = {
        "content-length": str(row.num_bytes),
        "content-disposition": f'attachment; filename="{name}"',
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(_read(row.uri), media_type="application/octet-stream", headers=headers)


async def _read(uri: str) -> AsyncIterator[bytes]:
    source = await anyio.to_thread.run_sync(storage.open_input, uri)
    try:
        while chunk := await anyio.to_thread.run_sync(source.read, CHUNK):
            yield chunk
    finally:
        source.close()


@router.delete("/{file_id}")
async def delete(store: StorePart, file_id: str) -> dict[str, Any]:
    async with store.begin() as session:
        row = await files.remove(session, file_id)
    await anyio.to_thread.run_sync(storage.delete, row.uri)
    return deleted("file", file_id)

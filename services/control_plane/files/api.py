"""The routes below /v1/files, which store, list, read and delete files."""

import io
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services import storage
from services.control_plane.core.errors import RangeNotSatisfiable
from services.control_plane.core.removal import remove_bytes
from services.control_plane.core.responses import deleted, listing
from services.control_plane.core.store import page
from services.control_plane.core.tables import File
from services.control_plane.files import files, row_check
from services.control_plane.files.requests import CreateFile
from services.control_plane.files.responses import file_object
from services.control_plane.http.dependencies import IdempotentPart, SettingsPart, StorePart
from services.control_plane.http.forms import multipart, read_form

router = APIRouter(prefix="/files")

FIELDS = (
    "expires_after[anchor]",
    "expires_after[seconds]",
    "x_raydpo[columns][prompt]",
    "x_raydpo[invalid_rows]",
    "x_raydpo[max_invalid_share]",
)
CHUNK = 1 << 20
IN_PARTS = "Send larger files in parts, with client.uploads.upload_file_chunked."
# One range of bytes, as RFC 9110 writes it. The service ignores other `Range` headers, as the RFC allows.
RANGE = re.compile(r"bytes=(?!-$)([0-9]{0,18})-([0-9]{0,18})")


@router.post("", openapi_extra=multipart("file", "purpose", *FIELDS))
async def create(request: Request, idempotent: IdempotentPart, store: StorePart, settings: SettingsPart) -> Response:
    """Stores a file and checks its rows. A file with a bad row is refused; the error names the line."""
    async with read_form(request, "file", most=settings.max_upload_bytes, remedy=IN_PARTS) as form:
        wanted = CreateFile.of(form.fields)
        reading = wanted.reading()
        filename = files.clean_name(form.filename, "file")
        async with store.begin() as session:  # refuses early; the reservation in `keep` is the one that counts
            await files.reserve(session, store.project_id, form.num_bytes, param="file")
        stored = await files.store_file(form.source, settings)

    async with files.removed_unless_named(stored):
        report = await row_check.report_of(stored, reading, param="file")

        async def keep(session: AsyncSession) -> dict[str, Any]:
            await files.reserve(session, store.project_id, stored.num_bytes, param="file")
            row = await files.add(
                session,
                stored,
                filename=filename,
                purpose=wanted.purpose,
                project_id=store.project_id,
                life_seconds=wanted.life_seconds,
                report=report,
                reading=reading,
            )
            return file_object(row)

        content = f"{filename}\n{wanted.model_dump_json()}\n{stored.num_bytes}\n{stored.sha256}"
        return await idempotent.act(keep, content=content)


@router.get("")
async def list_files(
    store: StorePart,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    query = select(File).where(File.alive())
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    async with store.look() as session:
        keys = [File.created_at, File.id]
        rows, more = await page(session, query, keys, after=after, limit=limit, descending=order == "desc")
    return JSONResponse(
        listing([file_object(row) for row in rows], more)
    )  # FastAPI's own encoder would take seconds for a long list


@router.get("/{file_id}")
async def retrieve(store: StorePart, file_id: str) -> dict[str, Any]:
    async with store.look() as session:
        return file_object(await files.find(session, file_id))


@router.get("/{file_id}/content")
async def content(request: Request, store: StorePart, file_id: str) -> Response:
    async with store.look() as session:
        row = await files.find(session, file_id)
    span, headers = range(row.num_bytes), {"accept-ranges": "bytes", **_attached(row.filename)}
    status = 200
    if asked := RANGE.fullmatch(request.headers.get("range", "")):
        span, status = _part(asked, row.num_bytes), 206
        if not span:
            raise RangeNotSatisfiable(f"The file has {row.num_bytes} bytes; none are in '{asked[0]}'.", row.num_bytes)
        headers["content-range"] = f"bytes {span.start}-{span.stop - 1}/{row.num_bytes}"
    headers["content-length"] = str(len(span))
    source = await anyio.to_thread.run_sync(storage.open_input, row.uri)
    return StreamingResponse(_read(source, span), status, headers, media_type="application/octet-stream")


def _attached(filename: str) -> dict[str, str]:
    name = re.sub(r"[^A-Za-z0-9._-]", "_", filename)
    return {"content-disposition": f'attachment; filename="{name}"', "x-content-type-options": "nosniff"}


def _part(asked: re.Match[str], num_bytes: int) -> range:
    """Returns the range of bytes that a `Range` header asks for; an empty range if the file has none of these bytes."""
    first, last = asked[1], asked[2]
    if not first:  # the last bytes of the file
        return range(max(0, num_bytes - int(last)), num_bytes)
    return range(int(first), min(int(last) + 1, num_bytes) if last else num_bytes)


async def _read(source: io.BufferedReader, span: range) -> AsyncIterator[bytes]:
    try:
        source.seek(span.start)
        left = len(span)
        while left and (chunk := await anyio.to_thread.run_sync(source.read, min(left, CHUNK))):
            left -= len(chunk)
            yield chunk
    finally:
        source.close()


@router.delete("/{file_id}")
async def delete(idempotent: IdempotentPart, file_id: str) -> Response:
    removed: list[File] = []

    async def remove(session: AsyncSession) -> dict[str, Any]:
        removed.append(await files.remove(session, file_id))
        return deleted("file", file_id)

    answer = await idempotent.act(remove, changes=file_id)
    for row in removed:
        await remove_bytes(row.uri)
    return answer

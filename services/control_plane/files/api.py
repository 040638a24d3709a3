"""The routes below /v1/files, which store, list, read and delete files."""

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.documents import Page, answers
from services.control_plane.core.removal import remove_bytes
from services.control_plane.core.responses import deleted, listing
from services.control_plane.core.store import page
from services.control_plane.core.tables import File
from services.control_plane.files import files, row_check
from services.control_plane.files.documents import FileDocument
from services.control_plane.files.requests import CreateFile
from services.control_plane.files.responses import file_object
from services.control_plane.http.content import Content, answer, read_file
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
IN_PARTS = "Send larger files in parts, with client.uploads.upload_file_chunked."


@router.post("", responses=answers(FileDocument), openapi_extra=multipart("file", "purpose", *FIELDS))
async def create(request: Request, idempotent: IdempotentPart, store: StorePart, settings: SettingsPart) -> Response:
    """Stores a file. The rows of a small training file are checked before the answer, and a file with a bad row is
    refused; the error names the line. The rows of a large file are checked after the answer.
    """
    async with read_form(request, "file", most=settings.max_upload_bytes, remedy=IN_PARTS) as form:
        wanted = CreateFile.of(form.fields)
        reading = wanted.reading()
        filename = files.clean_name(form.filename, "file")
        async with store.begin() as session:  # refuses early; the reservation in `keep` is the one that counts
            await files.reserve(session, store.project_id, form.num_bytes, param="file")
        async with request.app.state.storing.turn(store.project_id):
            stored = await files.store_file(form.source, settings)

    async with files.removed_unless_named(stored):
        report = await row_check.report_of(stored, reading, param="file", project_id=store.project_id)

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


@router.get("", responses=answers(Page[FileDocument]))
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


@router.get("/{file_id}", responses=answers(FileDocument))
async def retrieve(store: StorePart, file_id: str) -> dict[str, Any]:
    async with store.look() as session:
        return file_object(await files.find(session, file_id))


@router.get("/{file_id}/content")
async def content(request: Request, store: StorePart, file_id: str) -> Response:
    async with store.look() as session:
        row = await files.find(session, file_id)
    found = Content(
        num_bytes=row.num_bytes,
        etag=row.sha256,
        filename=row.filename,
        media_type="application/octet-stream",
        read=partial(read_file, row.uri),
        sha256=bytes.fromhex(row.sha256),
    )
    return await answer(request, found)


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

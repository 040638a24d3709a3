"""The routes below /v1/uploads, which take a file in parts if the file is too large for one request."""

from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.documents import answers
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.removal import remove_bytes
from services.control_plane.files import files, uploads
from services.control_plane.files.documents import PartDocument, UploadDocument
from services.control_plane.files.requests import CompleteUpload, CreateUpload
from services.control_plane.files.responses import part_object, upload_object
from services.control_plane.http.dependencies import IdempotentPart, SettingsPart, StorePart
from services.control_plane.http.forms import multipart, read_form

router = APIRouter(prefix="/uploads")


@router.post("", responses=answers(UploadDocument))
async def create(idempotent: IdempotentPart, store: StorePart, settings: SettingsPart, body: CreateUpload) -> Response:
    if body.bytes > settings.max_file_bytes:
        message = (
            f"bytes is {body.bytes}, but a file may have at most {settings.max_file_bytes}; "
            "split the file into several."
        )
        raise InvalidRequest(message, param="bytes")
    wanted = body.model_dump(include={"purpose", "mime_type"}) | {
        "filename": files.clean_name(body.filename, "filename"),
        "num_bytes": body.bytes,
        "file_seconds": body.life_seconds,
        "reading": body.reading().model_dump(),
    }

    async def begin(session: AsyncSession) -> dict[str, Any]:
        return upload_object(await uploads.begin(session, wanted, store.project_id), "pending", None)

    return await idempotent.act(begin)


@router.post("/{upload_id}/parts", responses=answers(PartDocument), openapi_extra=multipart("data"))
async def add_part(
    request: Request, idempotent: IdempotentPart, store: StorePart, settings: SettingsPart, upload_id: str
) -> Response:
    """Adds a part to the upload. Parts may arrive in any order, and several at the same time."""
    async with store.begin() as session:  # refuse before the body is read
        uploads.check_pending(*await uploads.find(session, upload_id), "added to")
    remedy = "Send the file in smaller parts."
    async with read_form(request, "data", most=uploads.PART_BYTES, remedy=remedy) as form:
        if form.fields:
            (name, *_) = form.fields
            raise InvalidRequest(f"Unknown parameter: '{name:.80}'.", param=name[:80], code="unknown_parameter")
        async with request.app.state.storing.turn(store.project_id):
            stored = await files.store(form.source, uploads.folder(upload_id, settings), "part_")

    async def keep(session: AsyncSession) -> dict[str, Any]:
        return part_object(await uploads.add_part(session, upload_id, stored))

    async with files.removed_unless_named(stored):
        return await idempotent.act(keep, content=stored.sha256)


@router.post("/{upload_id}/complete", responses=answers(UploadDocument))
async def complete(
    request: Request,
    idempotent: IdempotentPart,
    store: StorePart,
    settings: SettingsPart,
    upload_id: str,
    body: CompleteUpload,
) -> Response:
    """Joins the upload's parts to a file, and checks the rows of the file."""

    async def join(session: AsyncSession) -> dict[str, Any]:
        row, file = await uploads.complete(session, upload_id, body.part_ids, body.md5, settings)
        return upload_object(row, row.state, file)

    async with request.app.state.joining.turn(store.project_id):
        answer = await idempotent.act(join, changes=upload_id)
    await remove_bytes(uploads.folder(upload_id, settings))
    return answer


@router.post("/{upload_id}/cancel", responses=answers(UploadDocument))
async def cancel(idempotent: IdempotentPart, settings: SettingsPart, upload_id: str) -> Response:
    async def end(session: AsyncSession) -> dict[str, Any]:
        row = await uploads.cancel(session, upload_id)
        return upload_object(row, row.state, None)

    answer = await idempotent.act(end, changes=upload_id)
    await remove_bytes(uploads.folder(upload_id, settings))
    return answer

"""The routes below /v1/x/datasets, which show the rows of a training file, and report on them and on their encoding for
a model."""

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from services.control_plane import side_jobs
from services.control_plane.core.documents import answers
from services.control_plane.core.tables import reading_of
from services.control_plane.files import files, model_check
from services.control_plane.files import rows as file_rows
from services.control_plane.files.documents import CheckDocument, RowsDocument
from services.control_plane.files.requests import CheckDataset
from services.control_plane.files.responses import check_object
from services.control_plane.http.dependencies import Limit, RayApiPart, SettingsPart, StorePart
from services.control_plane.models import models

router = APIRouter(prefix="/x/datasets")


@router.post("/check", responses=answers(CheckDocument))
async def check(
    request: Request, store: StorePart, settings: SettingsPart, ray_api: RayApiPart, body: CheckDataset
) -> dict[str, Any]:
    """Returns a report on the training file's rows and, if a model is named, on the encoding of the rows for this
    model.

    Send the request again while the answer's status is `running`.
    """
    config = body.config()
    async with store.begin() as session:
        file = await files.find_checked(session, body.training_file, param="training_file")
        model = await models.find(session, settings, body.model) if body.model else None
    if model is None:
        return check_object(f"check-{file.id}", file, None)
    asked = model_check.check_of(file, model, config, settings, await store.store.instance())
    result = await side_jobs.result_of(asked, store, ray_api, settings.max_running_checks, request.is_disconnected)
    return check_object(asked.id, file, result, running=result is None)


@router.get("/{file_id}/rows", responses=answers(RowsDocument))
async def rows(
    store: StorePart, file_id: str, first: Annotated[int, Query(alias="from", ge=1, lt=2**63)] = 1, limit: Limit = 20
) -> JSONResponse:
    """Returns rows of a training file, from the line `from` on, as prompts with their completions."""
    async with store.look() as session:
        file = await files.find(session, file_id)
    return JSONResponse(await anyio.to_thread.run_sync(file_rows.page_of, file.uri, reading_of(file), first, limit))

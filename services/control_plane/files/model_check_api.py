"""The route /v1/x/datasets/check, which reports on the rows of a training file and on their encoding for a model."""

from typing import Any

from fastapi import APIRouter, Request

from services.control_plane import side_jobs
from services.control_plane.core.documents import answers
from services.control_plane.files import files, model_check
from services.control_plane.files.documents import CheckDocument
from services.control_plane.files.requests import CheckDataset
from services.control_plane.files.responses import check_object
from services.control_plane.http.dependencies import RayApiPart, SettingsPart, StorePart
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

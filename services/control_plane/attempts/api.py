"""The routes below /internal/attempts, to which training processes on Ray send their reports.

An attempt is one run of a job on the Ray cluster. Each attempt has its own token.
"""

from typing import Annotated

from fastapi import APIRouter, Header

from services.contract import OWN_TOKEN_HEADER, EventBatch, Wish
from services.control_plane.attempts import attempts
from services.control_plane.core.errors import Unauthorized
from services.control_plane.http.dependencies import Bearer, ServiceStorePart, SettingsPart
from services.control_plane.jobs import jobs

router = APIRouter(prefix="/internal/attempts")


@router.post("/{job_id}/{number}/events")
async def record(
    store: ServiceStorePart,
    settings: SettingsPart,
    job_id: str,
    number: int,
    batch: EventBatch,
    credentials: Bearer,
    own_token: Annotated[str | None, Header(alias=OWN_TOKEN_HEADER, min_length=32)] = None,
) -> Wish:
    """Records the reports that the training process of an attempt (run of a job on Ray) sends. A report that was
    recorded before is not recorded again. Returns the job's desired state: run, pause or cancel.

    `number` is the attempt's number within the job. If `own_token` is given, it becomes the attempt's only token.

    Answers 409 if the attempt has ended or a newer one has replaced it; the training process must then stop.
    """
    if credentials is None:
        raise Unauthorized(
            "Reports of a training process need its attempt's token in the header `Authorization: Bearer TOKEN`.",
            code="invalid_api_key",
        )
    async with store.begin() as session:
        await attempts.authorize(session, job_id, number, credentials.credentials, own_token)
        await attempts.record(session, job_id, number, batch.events, settings, posted=True)
        return Wish.model_validate({"desired": (await jobs.find(session, job_id)).desired})

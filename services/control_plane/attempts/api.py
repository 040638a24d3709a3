"""/internal/attempts, to which training reports. Each attempt has a token of its own."""

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
    """Records a batch, each report once, and returns what the user wants. 409 tells a replaced attempt to stop."""
    if credentials is None:
        raise Unauthorized("Reports need the attempt's token.", code="invalid_api_key")
    async with store.begin() as session:
        await attempts.authorize(session, job_id, number, credentials.credentials, own_token)
        await attempts.record(session, job_id, number, batch.events, settings, posted=True)
        return Wish.model_validate({"desired": (await jobs.find(session, job_id)).desired})

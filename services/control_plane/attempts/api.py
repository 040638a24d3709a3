"""/internal/attempts: where training reports. Each attempt has a token of its own."""

from fastapi import APIRouter

from services.contract import EventBatch, Wish
from services.control_plane.attempts import attempts
from services.control_plane.core.errors import Unauthorized
from services.control_plane.http.dependencies import Bearer, ServiceStorePart, SettingsPart
from services.control_plane.jobs import jobs

router = APIRouter(prefix="/internal/attempts")


@router.post("/{job_id}/{number}/events")
async def record(
    store: ServiceStorePart, settings: SettingsPart, job_id: str, number: int, batch: EventBatch, credentials: Bearer
) -> Wish:
    """Record a batch, each report once, and say what is wished; 409 tells an attempt that was replaced to stop."""
    if credentials is None:
        raise Unauthorized("Reports need the attempt's token.", code="invalid_api_key")
    async with store.begin() as session:
        await attempts.authorize(session, job_id, number, credentials.credentials)
        await attempts.record(session, job_id, number, batch.events, settings, posted=True)
        return Wish.model_validate({"desired": (await jobs.find(session, job_id)).desired})

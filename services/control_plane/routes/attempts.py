"""/internal/attempts: where training reports. Each attempt has a token of its own."""

from fastapi import APIRouter

from services.contract import EventBatch
from services.control_plane import jobs
from services.control_plane.errors import Unauthorized
from services.control_plane.routes.dependencies import Bearer, ServiceStorePart, SettingsPart

router = APIRouter(prefix="/internal/attempts")


@router.post("/{job_id}/{number}/events", status_code=204)
async def record(
    store: ServiceStorePart, settings: SettingsPart, job_id: str, number: int, batch: EventBatch, credentials: Bearer
) -> None:
    """Record a batch, each report once; 409 tells an attempt that was replaced to stop."""
    if credentials is None:
        raise Unauthorized("Reports need the attempt's token.", code="invalid_api_key")
    async with store.begin() as session:
        await jobs.authorize(session, job_id, number, credentials.credentials)
        await jobs.record(session, job_id, number, batch.events, settings)

"""/v1/x/jobs/{id}/logs: what driver and workers printed."""

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query

from services.control_plane.http.dependencies import SettingsPart, StorePart
from services.control_plane.jobs import jobs
from services.control_plane.progress import logs

router = APIRouter(prefix="/x/jobs")


@router.get("/{job_id}/logs")
async def read(
    store: StorePart,
    settings: SettingsPart,
    job_id: str,
    attempt: Annotated[int | None, Query(ge=1)] = None,
    source: Annotated[str, Query(pattern="^(driver|worker-[0-9]+)$")] = "driver",
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> dict[str, Any]:
    """The first first; ask for the next page with `after=next`."""
    async with store.look() as session:
        await jobs.find(session, job_id)
    return await anyio.to_thread.run_sync(
        lambda: logs.page(settings, job_id, attempt=attempt, source=source, after=after, limit=limit)
    )

"""/healthz: the process answers. /readyz: it can do its work."""

from fastapi import APIRouter
from sqlalchemy.exc import SQLAlchemyError

from services.control_plane.errors import Unavailable
from services.control_plane.routes.dependencies import ServiceStorePart
from services.control_plane.store import ping

router = APIRouter()


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(store: ServiceStorePart) -> dict[str, str]:
    """Ready means the database answers. Without Ray, jobs are taken and wait."""
    try:
        async with store.begin() as session:
            await ping(session)
    except (SQLAlchemyError, OSError):
        raise Unavailable("The database does not answer.", retry_after=5) from None
    return {"status": "ready"}

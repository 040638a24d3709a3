"""The routes /healthz, which answers while the process lives, and /readyz, which answers 200 while the database
works."""

import asyncio

from fastapi import APIRouter
from sqlalchemy.exc import SQLAlchemyError

from services.control_plane.core.errors import Unavailable
from services.control_plane.core.store import Store, check
from services.control_plane.http.dependencies import ServiceStorePart

router = APIRouter()
READY_SECONDS = 4.0


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(store: ServiceStorePart) -> dict[str, str]:
    """Answers 200 if the database takes reads and writes, and 503 otherwise.

    Ray may be down: the service accepts jobs, and they wait for Ray.
    """
    checking = asyncio.create_task(_check(store))
    done, _ = await asyncio.wait({checking}, timeout=READY_SECONDS)
    checking.cancel()  # a database that hangs must not delay the answer
    if not done or not checking.result():
        raise Unavailable(
            "The service is not ready, because its database does not answer or refuses writes.", retry_after=5
        )
    return {"status": "ready"}


async def _check(store: Store) -> bool:
    try:
        async with store.begin() as session:
            await check(session)
    except (SQLAlchemyError, OSError):
        return False
    return True

"""/metrics, for Prometheus. Without a key, as it names nothing that is anybody's."""

import time

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy.exc import SQLAlchemyError

from services.control_plane.core import telemetry
from services.control_plane.core.store import Store, census
from services.control_plane.http.dependencies import ServiceStorePart

router = APIRouter()

CENSUS_SECONDS = 5.0  # one look at the database serves all who ask within


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request, store: ServiceStorePart) -> Response:
    if time.monotonic() - getattr(request.app.state, "counted_at", float("-inf")) > CENSUS_SECONDS:
        request.app.state.counted_at = time.monotonic()
        await _count(store)
    telemetry.CONNECTIONS.labels("in_use").set(store.pool.checkedout())
    telemetry.CONNECTIONS.labels("idle").set(store.pool.checkedin())
    telemetry.CONNECTIONS_LIMIT.set(store.pool.size())
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def _count(store: Store) -> None:
    """Without a database the numbers stay out, so that nobody takes the last ones for today's."""
    for gauge in (telemetry.LEASE_SECONDS, telemetry.OUTBOX, telemetry.OUTBOX_SECONDS):
        gauge.set(float("nan"))
    telemetry.JOBS.clear()
    try:
        async with store.begin() as session:
            found = await census(session)
    except (SQLAlchemyError, OSError):
        return
    for state, number in found.jobs.items():
        telemetry.JOBS.labels(state).set(number)
    telemetry.LEASE_SECONDS.set(found.lease_seconds)
    telemetry.OUTBOX.set(found.outbox)
    telemetry.OUTBOX_SECONDS.set(found.outbox_seconds)

"""The route /metrics, from which Prometheus reads. It needs no API key, because metrics name no user's objects."""

import time

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy.exc import SQLAlchemyError

from services.control_plane.core import telemetry
from services.control_plane.core.store import Store, census
from services.control_plane.http.dependencies import ServiceStorePart

router = APIRouter()

CENSUS_SECONDS = 5.0  # requests within this time share the same counts from the database


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
    """Sets the gauges whose values come from the database.

    If the database does not answer, the gauges have no values, rather than old ones.
    """
    for gauge in (telemetry.LEASE_SECONDS, telemetry.OUTBOX, telemetry.OUTBOX_SECONDS):
        gauge.set(float("nan"))
    telemetry.JOBS.clear()
    try:
        async with store.begin() as session:
            counts = await census(session)
    except (SQLAlchemyError, OSError):
        return
    for state, number in counts.jobs.items():
        telemetry.JOBS.labels(state).set(number)
    telemetry.LEASE_SECONDS.set(counts.lease_seconds)
    telemetry.OUTBOX.set(counts.outbox)
    telemetry.OUTBOX_SECONDS.set(counts.outbox_seconds)

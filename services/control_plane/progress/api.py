"""The routes below /v1/x/jobs that show how a job goes on: its events as a stream, its metrics, and its logs."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, cast

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from services.control_plane.core.documents import answers
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.http.dependencies import SettingsPart, StorePart
from services.control_plane.jobs import jobs
from services.control_plane.jobs.documents import LogDocument, MetricsDocument
from services.control_plane.jobs.events.events import place_of
from services.control_plane.progress import logs
from services.control_plane.progress.metrics import Range, series
from services.control_plane.progress.streams import KEEPALIVE, Streams

router = APIRouter(prefix="/x/jobs")


async def _streams(request: Request) -> Streams:
    return cast(Streams, request.app.state.streams)


StreamsPart = Annotated[Streams, Depends(_streams)]


class EventStream(StreamingResponse):
    """A response that sends server-sent events. Whenever no event has come for a while, the response checks whether the
    client is still connected, and ends if the client has disconnected.

    The response runs in the task of the request itself. Starlette's own class would use two more tasks, and
    sse-starlette's four.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes]) -> None:
        super().__init__(frames, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._frames) as frames:
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
                if frame is KEEPALIVE and await Request(scope, receive).is_disconnected():
                    return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@router.get("/{job_id}/stream")
async def stream(
    store: StorePart, streams: StreamsPart, job_id: str, last_event_id: Annotated[str | None, Header()] = None
) -> EventStream:
    """Streams the job's events until the job ends. With the header `Last-Event-ID`, sends only the events after the
    event that the header names.
    """
    async with store.snapshot() as session:
        await jobs.find(session, job_id)
        place = await place_of(session, job_id, last_event_id) if last_event_id else 0
    if place is None:
        raise InvalidRequest(
            f"Last-Event-ID is '{last_event_id:.80}', but the job {job_id} has no such event; "
            "leave the header out to read from the start.",
            param="Last-Event-ID",
        )
    return EventStream(streams.follow(job_id, place))


@router.get("/{job_id}/metrics", responses=answers(MetricsDocument))
async def metrics(store: StorePart, job_id: str, asked: Annotated[Range, Query()]) -> dict[str, Any]:
    async with store.snapshot() as session:
        await jobs.find(session, job_id)
        return {"object": "fine_tuning.job.metrics", "job_id": job_id, **await series(session, job_id, asked)}


@router.get("/{job_id}/logs", responses=answers(LogDocument))
async def read_logs(
    store: StorePart,
    settings: SettingsPart,
    job_id: str,
    attempt: Annotated[int | None, Query(ge=1)] = None,
    source: Annotated[str, Query(pattern="^(driver|worker-[0-9]+)$")] = "driver",
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> dict[str, Any]:
    """Returns lines of the log of one of the job's processes, oldest first. For the next page, send this response's
    `next` as `after`.

    `source` names the process: `driver` (the job's main program), `worker-0`, `worker-1` and so on. `attempt` is the
    number of a run of the job on Ray; the default is the newest run.
    """
    async with store.look() as session:
        await jobs.find(session, job_id)
    return await anyio.to_thread.run_sync(
        lambda: logs.page(settings, job_id, attempt=attempt, source=source, after=after, limit=limit)
    )

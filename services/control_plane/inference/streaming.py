"""Stops work on an answer when the client disconnects, and passes on answers that a model streams as events."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from services.control_plane.core.errors import ApiError, NotFound
from services.control_plane.inference.metering import Meter
from services.control_plane.inference.upstream import Answer, Broken

Result = TypeVar("Result")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Runs `work` while the client is connected, and returns its result.

    `receive` is the request's ASGI channel. If the client disconnects first, cancels `work` and returns None.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """A response that passes a model's streamed answer on to the client, in whole lines, as they arrive.

    The response calls the function `end` once when the stream is over, also if the client disconnects before the first
    line. If the model stops in the middle of its answer, or is deleted, an event with an error replaces the incomplete
    line.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, meter: Meter, end: Callable[[], None]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._answer, self._meter, self._end = answer, meter, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._pass_on(send))
        finally:
            self._end()

    async def _pass_on(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        begun = b""
        try:
            while piece := await self._answer.piece():
                whole, newline, rest = piece.rpartition(b"\n")
                if not newline:
                    begun += piece
                    continue
                lines, begun = begun + whole + newline, rest
                if shown := self._meter.lines(lines):
                    await send({"type": "http.response.body", "body": shown, "more_body": True})
        except Broken:
            stopped = "The model stopped in the middle of its answer; send the request again."
            begun = _event(ApiError(stopped, code="model_error"))
        except NotFound as deleted:
            begun = _event(deleted)
        await send({"type": "http.response.body", "body": begun, "more_body": False})


def _event(error: ApiError) -> bytes:
    return f"\n\ndata: {json.dumps(error.body())}\n\n".encode()

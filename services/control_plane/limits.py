"""What may come in: bodies of bounded size that keep coming, and so many requests at once.

A refused request is answered at once; the server reads and drops what its client still sends, and does not reset it.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.control_plane.errors import ApiError, InvalidRequest, Stalled, TooLarge, Unavailable
from services.control_plane.settings import Settings

SLOWEST = 1024  # bytes a second that a body must come with, after a first while
HELD_BYTES = 2**28  # of bodies in memory, of all requests together
PROBES = ("/healthz", "/readyz")  # a busy service is alive


@dataclass
class Budget:
    """So many bytes, shared by the requests that are being read."""

    most: int
    what: str
    taken: int = 0

    def take(self, num_bytes: int) -> None:
        """Raises Unavailable where others hold too much. One alone is never refused."""
        if self.taken and self.taken + num_bytes > self.most:
            message = f"Requests hold {self.taken} of {self.most} bytes of {self.what}; send this one again."
            raise Unavailable(message, retry_after=2, code="overloaded")
        self.taken += num_bytes


class Body:
    """What a request sends. JSON is held in memory; a route that takes files says so with `spool`."""

    def __init__(self, receive: Receive, headers: Mapping[str, str], limits: "Limits") -> None:
        self._receive, self._limits = receive, limits
        self._declared = _declared(headers)
        self._most, self._remedy = limits.settings.max_json_bytes, "Send less."
        self._budget = limits.memory
        self._received = self._held = 0
        self._began: float | None = None
        self._complete = False

    def spool(self, most: int, remedy: str) -> None:
        """The body goes to disk, and may have `most` bytes. Room is kept for it before anything is read."""
        self._most, self._remedy, self._budget = most, remedy, self._limits.disk
        self._hold(self._declared)

    async def receive(self) -> Message:
        """The application's `receive`. Raises TooLarge, Stalled and Unavailable."""
        if self._complete:
            return await self._receive()
        if self._began is None:
            self._began = time.monotonic()
            self._check(self._declared)
        stall = self._limits.settings.stall_seconds
        left = self._began + stall + self._received / SLOWEST - time.monotonic()
        try:
            async with asyncio.timeout(min(stall, left)):
                message = await self._receive()
        except TimeoutError:
            raise Stalled(f"The body stalled after {self._received} bytes; send it again.") from None
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._hold(self._received)
            self._complete = not message.get("more_body", False)
        return message

    def give_back(self) -> None:
        self._budget.taken -= self._held
        self._held = 0

    def _hold(self, num_bytes: int) -> None:
        self._check(num_bytes)
        if num_bytes > self._held:
            self._budget.take(num_bytes - self._held)
            self._held = num_bytes

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._most:
            size = f"{num_bytes} bytes" if num_bytes == self._declared else f"more than {self._most} bytes"
            raise TooLarge(f"The body has {size}; the limit is {self._most}. {self._remedy}")


class Limits:
    """The middleware. Every request's Body is `request.state.body`."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self.settings = app, settings
        self.memory = Budget(HELD_BYTES, "memory")
        self.disk = Budget(settings.max_spool_bytes, "disk")
        self.answering = 0  # requests, without event streams: an open stream costs next to nothing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            await refusal.response()(scope, receive, send)
            return
        body = Body(receive, Headers(scope=scope), self)
        scope.setdefault("state", {})["body"] = body
        with ExitStack() as counted, ExitStack() as held:
            self.answering += 1
            counted.callback(self._leave)
            held.callback(body.give_back)

            async def send_on(message: Message) -> None:
                if message["type"] == "http.response.start" and _is_stream(message):
                    counted.close()
                await send(message)

            await self._app(scope, body.receive, send_on)

    def _leave(self) -> None:
        self.answering -= 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            return InvalidRequest("The URL holds a NUL character; remove it.")
        if self.answering >= self.settings.max_requests:
            message = f"{self.answering} requests are being answered, which is the limit; send this one again."
            return Unavailable(message, retry_after=1, code="overloaded")
        return None


def _declared(headers: Mapping[str, str]) -> int:
    """0 where the length is not told: the bytes are counted as they come."""
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0


def _is_stream(message: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"])

"""What may come in: bodies of bounded size that keep coming, and so many requests at once, of no project all of them.

A refused request is answered at once; the server reads and drops what its client still sends, and does not reset it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.control_plane.core.errors import ApiError, InvalidRequest, Stalled, TooLarge, Unavailable
from services.control_plane.settings import Settings

SLOWEST = 1024  # bytes a second that a body must come with, after a first while
HELD_BYTES = 2**28  # of bodies in memory, of all requests together
OPEN_STREAMS = 20_000  # of events: an open one costs next to nothing, but a socket
UNCOUNTED = ("/healthz", "/readyz", "/metrics")  # a busy service is alive, and can be looked at
INTERNAL = "/internal/"  # attempts' reports: no user's request takes their place
GENERATING = ("/v1/chat/completions", "/v1/completions")  # these wait for models, for minutes

STRANGERS = ""  # the holder of all that comes without a key that is known
ProjectOf = Callable[[str], Awaitable[str | None]]  # a bearer token's project; None: nobody's


class Room:
    """So much of something, shared by requests. Each has a holder, or None: the service's own.

    A holder may have all that one request needs, and with further ones no more than it leaves free. So one alone gets
    half, two a third each, and there is always some left for the next one.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most, self._what = most, what
        self.taken = 0
        self._held: Counter[str] = Counter()

    def take(self, amount: int, holder: str | None = None, *, has: int = 0) -> None:
        """Raises Unavailable. `has` is what the same request has already; one that is alone is never refused."""
        if self.taken and self.taken + amount > self.most:
            raise self._full(f"Requests hold {self.taken} of {self.most} {self._what}")
        if holder is not None:
            held, free = self._held[holder], self.most - self.taken
            if held > has and held + amount > free - amount:
                whose = "unknown keys" if holder == STRANGERS else "this project"
                part = f"Requests of {whose} hold {held} of {self.most} {self._what}, and leave {free} to others"
                raise self._full(part)
            self._held[holder] += amount
        self.taken += amount

    def give_back(self, amount: int, holder: str | None = None) -> None:
        self.taken -= amount
        if holder is not None:
            self._held[holder] -= amount
            self._held += Counter()  # forgets who holds nothing

    def _full(self, message: str) -> Unavailable:
        return Unavailable(f"{message}; send this one again.", retry_after=1, code="overloaded")


class Bounds:
    """What the requests of one side share."""

    def __init__(self, settings: Settings) -> None:
        self.places = Room(settings.max_requests, "places of requests that are answered at once")
        self.streams = Room(OPEN_STREAMS, "open streams")
        self.memory = Room(HELD_BYTES, "bytes of memory")
        self.disk = Room(settings.max_spool_bytes, "bytes of disk")


class Place:
    """One request's, until it is answered."""

    def __init__(self, bounds: Bounds, holder: str | None) -> None:
        """Raises Unavailable where there is none left for the holder."""
        bounds.places.take(1, holder)
        self.bounds, self.holder = bounds, holder
        self._room = bounds.places

    def become_stream(self) -> None:
        """Leave it for one among the open streams. Raises Unavailable."""
        self.bounds.streams.take(1, self.holder)
        self.leave()
        self._room = self.bounds.streams

    def leave(self) -> None:
        self._room.give_back(1, self.holder)


class Body:
    """What a request sends. JSON is held in memory; a route that takes files says so with `spool`."""

    def __init__(self, receive: Receive, headers: Mapping[str, str], settings: Settings, place: Place) -> None:
        self._receive, self._stall, self._place = receive, settings.stall_seconds, place
        self._declared = _declared(headers)
        self._most, self._remedy = settings.max_json_bytes, "Send less."
        self._room = place.bounds.memory
        self._received = self._held = 0
        self._began: float | None = None
        self._complete = False

    def spool(self, most: int, remedy: str) -> None:
        """The body goes to disk, and may have `most` bytes. Room is kept for it before anything is read."""
        self._most, self._remedy, self._room = most, remedy, self._place.bounds.disk
        self._hold(self._declared)

    async def receive(self) -> Message:
        """The application's `receive`. Raises TooLarge, Stalled and Unavailable."""
        if self._complete:
            return await self._receive()
        if self._began is None:
            self._began = time.monotonic()
            self._check(self._declared)
        left = self._began + self._stall + self._received / SLOWEST - time.monotonic()
        try:
            async with asyncio.timeout(min(self._stall, left)):
                message = await self._receive()
        except TimeoutError:
            raise Stalled(f"The body stalled after {self._received} bytes; send it again.") from None
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._hold(self._received)
            self._complete = not message.get("more_body", False)
        return message

    def give_back(self) -> None:
        self._room.give_back(self._held, self._place.holder)
        self._held = 0

    def _hold(self, num_bytes: int) -> None:
        self._check(num_bytes)
        if num_bytes > self._held:
            self._room.take(num_bytes - self._held, self._place.holder, has=self._held)
            self._held = num_bytes

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._most:
            size = f"{num_bytes} bytes" if num_bytes == self._declared else f"more than {self._most} bytes"
            raise TooLarge(f"The body has {size}; the limit is {self._most}. {self._remedy}")


class Limits:
    """The middleware. Every request's Body is `request.state.body`."""

    def __init__(self, app: ASGIApp, settings: Settings, project_of: ProjectOf) -> None:
        self._app, self._settings, self._project_of = app, settings, project_of
        self.users, self.attempts = Bounds(settings), Bounds(settings)
        self._asking = Room(settings.max_requests, "places of requests whose keys are looked up")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNCOUNTED:
            await self._app(scope, receive, send)
            return
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            refusal = InvalidRequest("The URL holds a NUL character; remove it.")
            await refusal.response()(scope, receive, send)
            return
        try:
            place = await self._enter(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        body = Body(receive, Headers(scope=scope), self._settings, place)
        scope.setdefault("state", {})["body"] = body

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_stream(scope, message):
                place.become_stream()
            await send(message)

        try:
            await self._app(scope, body.receive, send_on)
        finally:
            body.give_back()
            place.leave()

    async def _enter(self, scope: Scope) -> Place:
        """A place for the request, before anything of it is read. Raises Unavailable."""
        if scope["path"].startswith(INTERNAL):
            return Place(self.attempts, None)
        return Place(self.users, await self._holder(scope))

    async def _holder(self, scope: Scope) -> str:
        """The request's project, as its key tells.

        Completions are a holder of their own: while a project waits for its models, its other requests are answered.
        """
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return STRANGERS
        self._asking.take(1)
        try:
            project = await self._project_of(token)
        finally:
            self._asking.give_back(1)
        return f"{project} {scope['path'] in GENERATING}" if project else STRANGERS


def _declared(headers: Mapping[str, str]) -> int:
    """0 where the length is not told: the bytes are counted as they come."""
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0


def _is_stream(scope: Scope, message: Message) -> bool:
    """Of a job's events. A completion that is streamed keeps its place: a model is at work for it."""
    kinds = (value for name, value in message["headers"] if name == b"content-type")
    return scope["path"] not in GENERATING and any(kind.startswith(b"text/event-stream") for kind in kinds)

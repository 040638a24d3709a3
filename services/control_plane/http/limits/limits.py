"""Limits the size of a request's body, how slowly it may arrive, and how many requests are answered at the same time.

No project can use up the amounts that all requests share. A refused request is answered immediately; the server reads
and drops the rest of the request, so that the connection is not reset.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.control_plane.core.errors import ApiError, InvalidRequest, Stalled, TooLarge, Unavailable
from services.control_plane.settings import Settings

SLOWEST = 1024  # bytes a second that a body must bring on average, after `stall_seconds`
HELD_BYTES = 2**28  # the most bytes of bodies in memory, of all requests together
OPEN_STREAMS = 20_000  # the most open event streams; each costs little more than its socket
UNCOUNTED = ("/healthz", "/readyz", "/metrics")  # answered even if the service is busy
INTERNAL = "/internal/"  # reports of training processes; their own limits keep users' requests from delaying them
ASKING_MODELS = ("/v1/chat/completions", "/v1/completions", "/v1/x/rewards")  # these may wait for a model for minutes

STRANGERS = ""  # the holder (see Room) of all requests without a known key
ProjectOf = Callable[[str], Awaitable[str | None]]  # returns the project of a bearer token; None: an unknown token


class Room:
    """A limited amount of something, such as memory, that all requests share.

    Each request belongs to a holder, which is a project or the service itself. If a holder has only one request, this
    request may take all that it needs. Several requests of one holder may together take at most as much as they leave
    free for other holders. One busy holder therefore gets half of the amount, two busy holders get a third each, and
    some of the amount is always left.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most, self._what = most, what
        self.taken = 0
        self._held: Counter[str] = Counter()

    def take(self, amount: int, holder: str | None = None, *, has: int = 0) -> None:
        """Reserves `amount` of the shared amount for a request of `holder`, such as a project. Raises Unavailable if
        too little is left.

        `has` is the amount that this request has reserved already. If no other request has reserved anything, the
        request may take any amount. If `holder` is None, the request need not leave a part for other holders.
        """
        if self.taken and self.taken + amount > self.most:
            raise self._full(f"The service is full: requests use {self.taken} of at most {self.most} {self._what}")
        if holder is not None:
            held, free = self._held[holder], self.most - self.taken
            if held > has and held + amount > free - amount:
                whose = "unknown keys" if holder == STRANGERS else "this project"
                part = (
                    f"Requests of {whose} use {held} of {self.most} {self._what}, "
                    f"and the {free} left are kept for other projects"
                )
                raise self._full(part)
            self._held[holder] += amount
        self.taken += amount

    def give_back(self, amount: int, holder: str | None = None) -> None:
        self.taken -= amount
        if holder is not None:
            self._held[holder] -= amount
            self._held += Counter()  # drops holders that hold nothing

    def _full(self, message: str) -> Unavailable:
        return Unavailable(f"{message}. Wait a second and send this request again.", retry_after=1, code="overloaded")


class Bounds:
    """The limited amounts that requests share: requests at the same time, open event streams, memory and disk.

    All requests of users share one object of this class. All reports of training processes share another one.
    """

    def __init__(self, settings: Settings) -> None:
        self.places = Room(settings.max_requests, "requests at once")
        self.streams = Room(OPEN_STREAMS, "open streams")
        self.memory = Room(HELD_BYTES, "bytes of memory")
        self.disk = Room(settings.max_spool_bytes, "bytes of disk")


class Place:
    """A request's slot under the limit on requests that are answered at the same time.

    The request holds the slot until it is answered. For a streamed answer, the request exchanges this slot for a slot
    under the limit on open streams.
    """

    def __init__(self, bounds: Bounds, holder: str | None) -> None:
        """Counts one more request of `holder`, such as a project, as being answered now. `bounds` are the limited
        amounts that requests share.

        Raises Unavailable if the limit on requests that are answered at the same time is reached for this holder.
        """
        bounds.places.take(1, holder)
        self.bounds, self.holder = bounds, holder
        self._room = bounds.places

    def become_stream(self) -> None:
        """Counts the request as an open stream from now on, no longer as a request that is being answered.

        Raises Unavailable if the limit on open streams is reached.
        """
        self.bounds.streams.take(1, self.holder)
        self.leave()
        self._room = self.bounds.streams

    def leave(self) -> None:
        self._room.give_back(1, self.holder)


class Body:
    """The body of a request while it arrives, within the limits on size and time.

    The body is held in memory. A route that takes files calls `spool` before it reads the body, and writes the body to
    disk while it arrives.
    """

    def __init__(self, receive: Receive, headers: Mapping[str, str], settings: Settings, place: Place) -> None:
        self._receive, self._stall, self._place = receive, settings.stall_seconds, place
        self._declared = _declared(headers)
        self._most, self._remedy = settings.max_json_bytes, "Send less."
        self._room = place.bounds.memory
        self._received = self._held = 0
        self._began: float | None = None
        self._complete = False

    def spool(self, most: int, remedy: str) -> None:
        """Allows the body to have up to `most` bytes, because the route writes it to disk, and reserves the disk space.

        `remedy` is a sentence for the error about a body that is too large. Raises Unavailable if too little disk is
        left.
        """
        self._most, self._remedy, self._room = most, remedy, self._place.bounds.disk
        self._hold(self._declared)

    async def receive(self) -> Message:
        """Returns the next part of the body, like ASGI's `receive`.

        Raises TooLarge for a body above the limit, Stalled if the client stops sending, and Unavailable if the memory
        or disk space that all requests share is used up.
        """
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
            raise Stalled(f"The request's body stopped after {self._received} bytes; send the request again.") from None
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
            raise TooLarge(f"The body of the request has {size}; the limit is {self._most}. {self._remedy}")


class Limits:
    """The ASGI middleware that limits how large and how slow a request may be, and how many are answered at the same
    time.

    Stores the request's body, as a Body, in `request.state.body`. Calls the functions in `request.state.at_end` when
    the request is answered, or its client has left.
    """

    def __init__(self, app: ASGIApp, settings: Settings, project_of: ProjectOf) -> None:
        self._app, self._settings, self._project_of = app, settings, project_of
        self.users, self.attempts = Bounds(settings), Bounds(settings)
        self._asking = Room(settings.max_requests, "requests whose API keys are being looked up")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNCOUNTED:
            await self._app(scope, receive, send)
            return
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            refusal = InvalidRequest("The URL contains a NUL character; remove the character.")
            await refusal.response()(scope, receive, send)
            return
        try:
            place = await self._enter(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        body = Body(receive, Headers(scope=scope), self._settings, place)
        at_end: list[Callable[[], None]] = []
        scope.setdefault("state", {}).update(body=body, at_end=at_end)

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_stream(scope, message):
                place.become_stream()
            await send(message)

        try:
            await self._app(scope, body.receive, send_on)
        finally:
            body.give_back()
            place.leave()
            for end in at_end:
                end()

    async def _enter(self, scope: Scope) -> Place:
        """Counts the request towards the limit on requests that are answered at the same time, before its body is read.

        Returns the request's slot. Raises Unavailable if the limit is reached.
        """
        if scope["path"].startswith(INTERNAL):
            return Place(self.attempts, None)
        return Place(self.users, await self._holder(scope))

    async def _holder(self, scope: Scope) -> str:
        """Returns the name under which the request counts against the limits: the project of its API key.

        Completions of a project count under a name of their own. So the project's other requests are answered while its
        completions wait for models.
        """
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return STRANGERS
        self._asking.take(1)
        try:
            project = await self._project_of(token)
        finally:
            self._asking.give_back(1)
        return f"{project} {scope['path'] in ASKING_MODELS}" if project else STRANGERS


def _declared(headers: Mapping[str, str]) -> int:
    """Returns the length that a request's headers state for its body, in bytes. Returns 0 if the headers state no
    length.

    The stated length is not trusted: the bytes that arrive are counted as well.
    """
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0


def _is_stream(scope: Scope, message: Message) -> bool:
    """Whether the answer is a stream of a job's events. Returns False for streamed completions: they stay under the
    limit on requests, because a model works on them all the time.
    """
    kinds = (value for name, value in message["headers"] if name == b"content-type")
    return scope["path"] not in ASKING_MODELS and any(kind.startswith(b"text/event-stream") for kind in kinds)

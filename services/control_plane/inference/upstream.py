"""An HTTP client for sending requests to engines (the servers of models on Ray Serve).

A stream of tokens arrives in one chunk per token. A general HTTP client takes more time per chunk than all the rest of
the control plane. This client returns all bytes that have arrived since the last call. Each connection serves one
request and is closed when the answer ends. So an engine notices that a client has left, and stops generating.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from services.control_plane.core.errors import ApiError

CONNECT_SECONDS = 5.0
MOST_WAITING = 2**20  # bytes of an answer that wait for a slow client before reading from the engine pauses


class Broken(Exception):
    """Raised if an engine (model server) cannot be reached, ends the connection early, is silent for too long, or does
    not speak HTTP.
    """


class Busy(Exception):
    """Raised if a request has waited for a free connection as long as it may, because all connections are in use."""


class Upstream:
    """Sends requests to engines (model servers), over at most `connections` connections at the same time.

    A request waits at most `wait_seconds` for a free connection. An engine may be silent for at most `silence_seconds`.
    """

    def __init__(self, *, connections: int, silence_seconds: float, wait_seconds: float) -> None:
        self._free = asyncio.Semaphore(connections)
        self._silence, self._wait = silence_seconds, wait_seconds
        self._open: dict[Answer, str] = {}  # the id of the model that gives each answer

    @property
    def model_ids(self) -> set[str]:
        """Returns the ids of the models whose answers are under way."""
        return set(self._open.values())

    def end(self, model_id: str, error: ApiError) -> None:
        """Ends all answers of a model that are under way. Whoever reads such an answer gets `error`."""
        for answer in [answer for answer, whose in self._open.items() if whose == model_id]:
            answer.end(error)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, model_id: str) -> "Answer":
        """Sends a JSON body to the engine (model server) at `url`, and returns the answer once its status and headers
        have arrived. `model_id` is the id of the model that the client named.

        The caller reads the answer's body, and must close the answer. Raises Busy if no connection is free, and Broken
        if the engine does not answer.
        """
        try:
            async with asyncio.timeout(self._wait):
                await self._free.acquire()
        except TimeoutError:
            raise Busy from None
        answer = Answer(self._silence, lambda: self._close(answer))
        self._open[answer] = model_id
        try:
            await answer.open(url, _head(url, headers, len(body)) + body)
        except BaseException:
            answer.close()
            raise
        return answer

    def _close(self, answer: "Answer") -> None:
        del self._open[answer]
        self._free.release()


def _head(url: str, headers: Mapping[str, str], length: int) -> bytes:
    place = urlsplit(url)
    fields = {"host": place.netloc, "content-type": "application/json", "content-length": str(length), **headers}
    lines = [f"POST {place.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1")


class Answer(asyncio.Protocol):
    """The answer of an engine (model server) to one request: its status, its headers, and its body, which is read in
    pieces.
    """

    status: int
    headers: dict[str, str]  # names in lower case

    def __init__(self, silence_seconds: float, on_close: Callable[[], None]) -> None:
        self._silence, self._on_close = silence_seconds, on_close
        self._parser: Any = httptools.HttpResponseParser(self)
        self._waiting = bytearray()
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Future[None] | None = None  # what the reader waits for
        self._waits_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._begun = self._whole = self._paused = False
        self._trouble: Exception | None = None  # what the reader gets
        self._transport: asyncio.Transport | None = None
        self.headers = {}

    async def open(self, url: str, request: bytes) -> None:
        """Connects to the host of `url`, sends the bytes of `request`, and waits for the status and headers of the
        answer.

        Raises Broken if the host cannot be reached, or does not answer with valid HTTP in time.
        """
        place = urlsplit(url)
        secure = place.scheme == "https"
        port = place.port or (443 if secure else 80)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._loop.create_connection(lambda: self, place.hostname or "", port, ssl=secure or None)
        except OSError as error:  # also a TimeoutError
            raise Broken(f"it cannot be reached: {error or type(error).__name__}") from None
        assert self._transport
        self._transport.write(request)
        self._timer = self._loop.call_later(self._silence, self._check_silence)
        await self._wait_for(lambda: self._begun)

    def close(self) -> None:
        """Closes the connection, which then no longer counts towards the limit on connections. Closing twice is
        harmless.
        """
        if self._timer:
            self._timer.cancel()
        if self._transport:
            self._transport.abort()
        self._on_close()
        self._on_close = _nothing

    def end(self, error: ApiError) -> None:
        """Closes the connection, so that the engine (model server) stops generating. Whoever reads the answer gets
        `error` in place of what has not been read.
        """
        self._waiting.clear()
        self._whole, self._trouble = False, error
        if self._transport:
            self._transport.abort()
        self._tell()

    async def piece(self) -> bytes:
        """Waits for bytes of the answer's body, and returns all that have arrived since the last call. Returns b"" at
        the body's end.

        Raises Broken if the connection ends before the body does, or the engine (model server) is silent for too long.
        """
        if self.headers.get("content-encoding", "identity") != "identity":
            raise Broken(f"its answer is encoded as {self.headers['content-encoding']}, which was not requested")
        await self._wait_for(lambda: self._waiting or self._whole)
        piece = bytes(self._waiting)
        self._waiting.clear()
        if self._paused and self._transport:
            self._paused = False
            self._transport.resume_reading()
        return piece

    async def body(self) -> bytes:
        """Reads and returns the rest of the answer's body. Raises Broken if the engine (model server) stops sending
        before the body's end.
        """
        parts = []
        while piece := await self.piece():
            parts.append(piece)
        return b"".join(parts)

    async def _wait_for(self, has: Callable[[], object]) -> None:
        while not has():
            if self._trouble:
                raise self._trouble
            self._news, self._waits_since = self._loop.create_future(), self._loop.time()
            try:
                await self._news
            finally:
                self._news = None

    def _check_silence(self) -> None:
        """Ends the answer with an error if its reader has waited too long for the engine (model server). Otherwise
        schedules the method to run again. (One timer for each answer costs less than one for each wait.)
        """
        left = self._silence - (self._loop.time() - self._waits_since if self._news else 0.0)
        if left <= 0:
            self._fail(f"it was silent for {self._silence:g} seconds")
        else:
            self._timer = self._loop.call_later(left, self._check_silence)

    def _tell(self) -> None:
        if self._news and not self._news.done():
            self._news.set_result(None)

    # --- what asyncio and the parser call -------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"its answer is not valid HTTP: {error}")
        if len(self._waiting) > MOST_WAITING and not self._paused and self._transport:
            self._paused = True
            self._transport.pause_reading()
        self._tell()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._whole:
            self._fail(f"the connection ended{f': {error}' if error else ''}")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status, self._begun = self._parser.get_status_code(), True

    def on_body(self, data: bytes) -> None:
        self._waiting += data

    def on_message_complete(self) -> None:
        self._whole = True

    def _fail(self, trouble: str) -> None:
        self._trouble = self._trouble or Broken(trouble)
        self._tell()


def _nothing() -> None:
    pass

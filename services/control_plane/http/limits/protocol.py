"""Adds two limits to uvicorn's HTTP protocol: on the headers of a request, and on clients that do not read their
response."""

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.control_plane.core.errors import envelope
from services.control_plane.http.limits.limits import SLOWEST

HEAD_BYTES = 2**16  # the most bytes of request line and headers
HEAD_SECONDS = 30.0


class Protocol(HttpToolsProtocol):
    """A connection to a client. The client must send the request line and headers within 30 seconds, in at most 64 KiB.
    It must also read the response.
    """

    _head_bytes: int | None = 0  # bytes received of the request line and headers; None: both are complete
    _has_ended = False  # whether a request ended in the bytes parsed last, so that not all of them are the next head
    _head_timer: asyncio.TimerHandle | None = None
    _unread: int | None = None  # bytes that were unsent at the last check; None: all were sent
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so pause_writing is called as soon as a byte cannot be sent
        self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._has_ended = True
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        # One byte more than the head may have, so that a head that is too long does not end within what is parsed.
        end = HEAD_BYTES + 1 - (self._head_bytes or 0)
        first, rest = data[:end], data[end:]
        self._has_ended = False
        super().data_received(first)
        if self._head_bytes is not None and not self._has_ended and not self.transport.is_closing():
            self._head_bytes += len(first)
            if self._head_bytes > HEAD_BYTES:
                self.send_400_response(
                    f"The request line and headers have more than {HEAD_BYTES} bytes; send shorter headers."
                )
        if rest and not self.transport.is_closing():
            self.data_received(rest)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._all_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        self._all_read()
        super().resume_writing()

    def _expect_reading(self) -> None:
        """Aborts the connection if the client has read too little of the response since this method last ran.

        If the client has read enough, schedules the method to run again. (Closing the connection instead of aborting it
        would wait until the client has read the remaining bytes.)
        """
        stall: float = self.config.app.state.settings.stall_seconds  # type: ignore[union-attr]  # the app
        unread = self.transport.get_write_buffer_size()
        if self._unread is not None and self._unread - unread < stall * SLOWEST:
            self.transport.abort()
            return
        self._unread, self._read_timer = unread, self.loop.call_later(stall, self._expect_reading)

    def _all_read(self) -> None:
        self._unread = None
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answers 400 in OpenAI's form to a request that never reaches the app, and closes the connection."""
        body = json.dumps(envelope(msg, "invalid_request_error")).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head.encode() + body)
        self.transport.close()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._stop_timer()
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

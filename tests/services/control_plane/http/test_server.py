"""Tests the end of the web server."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import httpx
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from services.control_plane.http.server import Server
from tests.services.control_plane.conftest import free_port


class Streams:
    def __init__(self) -> None:
        self.ends = asyncio.Event()

    async def close(self) -> None:
        self.ends.set()

    async def lines(self) -> AsyncIterator[bytes]:
        yield b"first\n"
        await self.ends.wait()
        yield b"last\n"


def test_open_streams_end_with_the_server_and_are_sent_to_their_last_line() -> None:
    app, streams = FastAPI(), Streams()
    app.state.streams, app.state.settings = streams, SimpleNamespace(stall_seconds=60)

    @app.get("/events")
    async def events() -> StreamingResponse:
        return StreamingResponse(streams.lines())

    port = free_port()
    server = Server(app, port=port, log_level="warning")
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with httpx.stream("GET", f"http://127.0.0.1:{port}/events", trust_env=False, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "first"
        server.should_exit = True
        assert list(lines) == ["last"]
    thread.join(30)
    assert not thread.is_alive()

"""Defines the web server in which the app runs."""

import asyncio
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from services.control_plane.http.limits.protocol import Protocol


class Server(uvicorn.Server):
    """A uvicorn server that ends the open event streams when it shuts down.

    uvicorn's own server would wait for the streams until their jobs end.
    """

    def __init__(self, app: FastAPI, **options: Any) -> None:
        super().__init__(uvicorn.Config(app, http=Protocol, ws="none", **options))
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # The streams end a moment after this process stops listening, so that clients reconnect to another process.
        closing = asyncio.create_task(self._app.state.streams.close())
        await super().shutdown(sockets)
        await closing

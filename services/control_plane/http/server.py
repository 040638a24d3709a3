"""The web server around the app."""

import asyncio
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from services.control_plane.http.protocol import Protocol


class Server(uvicorn.Server):
    """Ends the open streams when it stops: it waits for all requests, and streams would last as long as their jobs."""

    def __init__(self, app: FastAPI, **options: Any) -> None:
        super().__init__(uvicorn.Config(app, http=Protocol, ws="none", **options))
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A moment later: nothing listens here by then, so that who resumes does so elsewhere.
        closing = asyncio.create_task(self._app.state.streams.close())
        await super().shutdown(sockets)
        await closing

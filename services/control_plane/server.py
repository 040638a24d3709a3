"""The web server around the app."""

import asyncio
import socket

import uvicorn
from fastapi import FastAPI


class Server(uvicorn.Server):
    """Ends the open streams when it stops: it waits for all requests, and streams would last as long as their jobs."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A moment later: nothing listens here by then, so that who resumes does so elsewhere.
        closing = asyncio.create_task(self._app.state.live.close())
        await super().shutdown(sockets)
        await closing

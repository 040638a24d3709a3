"""Makes clients of a replica try again while the replica's vLLM engine is dead.

Without this module, vLLM would answer the clients' requests with status 500. Ray Serve replaces the replica, so the
same request soon succeeds.
"""

from typing import Protocol

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MESSAGE = "The model's engine has died and is being restarted; send the request again in a few seconds."
RETRY_AFTER_SECONDS = 5


class Engine(Protocol):
    """The part of vLLM's engine client that tells whether the engine still works. RetryLater needs only this part."""

    @property
    def errored(self) -> bool: ...


class RetryLater:
    """ASGI middleware that asks clients to send their request again while the vLLM engine is dead.

    While the engine is dead, clients get status 503 with the header `retry-after` in place of any answer with status
    500 or above. The error's type is `engine_died`, by which the control plane tells a dead engine from a busy one. All
    other answers pass unchanged, and so does the rest of a stream that has begun.
    """

    def __init__(self, app: ASGIApp, *, engine: Engine) -> None:
        self._app, self._engine = app, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced = False

        async def send_or_replace(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= 500 and self._engine.errored:
                replaced = True
                error = {"message": MESSAGE, "type": "engine_died", "param": None, "code": "model_unavailable"}
                headers = {"retry-after": str(RETRY_AFTER_SECONDS)}
                await JSONResponse({"error": error}, 503, headers)(scope, receive, send)
            elif not replaced:
                await send(message)

        await self._app(scope, receive, send_or_replace)

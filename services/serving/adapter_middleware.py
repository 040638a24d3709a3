"""Attaches the LoRA adapter that a request names, so that the engine answers with that adapter.

One vLLM engine serves a base model and the adapters trained on it. The control plane names the adapter of a request in
two HTTP headers. The middleware in this module attaches that adapter to the engine before the request is answered.
"""

import json
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.lora.request import LoRARequest

from services.contract import ADAPTER_HEADER, ADAPTER_SOURCE_HEADER, Adapter
from services.serving.adapters import AdapterDeleted, AdapterRefused, Adapters

of_request: ContextVar[LoRARequest | None] = ContextVar("of_request", default=None)
"""The adapter that the headers of the current HTTP request name."""


class AttachAdapter:
    """ASGI middleware that attaches a LoRA adapter to the vLLM engine before vLLM reads the body of a request. The
    headers of the request name the adapter.

    The field `model` of the body names the same adapter. A request whose headers name no adapter passes unchanged. If
    the engine refuses the adapter, the client gets an error in OpenAI's format. If the adapter is deleted while the
    engine answers, the answer ends immediately with such an error.
    """

    def __init__(self, app: ASGIApp, *, adapters: Adapters) -> None:
        self._app, self._adapters = app, adapters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        adapter = _adapter(scope)
        if adapter is None:
            await self._app(scope, receive, send)
            return
        try:
            async with self._adapters.using(adapter) as (attachment, request):
                of_request.set(request)
                answer = _Answer(scope, receive, send, adapter.id, lambda: attachment.is_deleted)
                try:
                    await self._app(scope, receive, answer.send)
                except Exception:
                    if not attachment.is_deleted or answer.streams is not None:
                        raise
                    raise AdapterDeleted(adapter.id) from None  # its requests were aborted
        except AdapterRefused as refusal:
            await _refuse(refusal, scope, receive, send)


def _adapter(scope: Scope) -> Adapter | None:
    if scope["type"] != "http":
        return None
    headers = Headers(scope=scope)
    names = headers.get(ADAPTER_HEADER), headers.get(ADAPTER_SOURCE_HEADER)
    return Adapter(id=unquote(names[0]), source=unquote(names[1])) if names[0] and names[1] else None


async def _refuse(refusal: AdapterRefused, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(_body(refusal), status_code=refusal.status)(scope, receive, send)


def _body(refusal: AdapterRefused) -> dict[str, object]:
    return {"error": {"message": str(refusal), "type": "invalid_request_error", "param": "model", "code": refusal.code}}


@dataclass
class _Answer:
    """Passes the messages of one HTTP response on to the client, until the adapter that the response uses is deleted.

    After the deletion, an error replaces the rest of the response. There is one exception: a response that has begun
    and is no event stream is still sent as a whole.
    """

    scope: Scope
    receive: Receive
    to_client: Send
    adapter_id: str
    is_deleted: Callable[[], bool]
    streams: bool | None = None  # None: the answer has not begun
    has_ended: bool = False

    async def send(self, message: Message) -> None:
        if self.has_ended:
            return
        if self.is_deleted() and self.streams is not False:
            self.has_ended = True
            await self._end()
            return
        if message["type"] == "http.response.start":
            self.streams = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        await self.to_client(message)

    async def _end(self) -> None:
        refusal = AdapterDeleted(self.adapter_id)
        if self.streams is None:
            await _refuse(refusal, self.scope, self.receive, self.to_client)
        else:
            event = f"\n\ndata: {json.dumps(_body(refusal))}\n\n".encode()
            await self.to_client({"type": "http.response.body", "body": event, "more_body": False})

"""Gives every request an id, adds headers to every response, writes the access log, and counts requests for
Prometheus."""

import logging
import re
import secrets
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import tracing
from services.control_plane.core import log_setup
from services.control_plane.core.errors import envelope
from services.control_plane.core.telemetry import REQUEST_SECONDS, REQUESTS

log = logging.getLogger(__name__)

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
QUIET = ("/healthz", "/readyz", "/metrics")  # not logged, because machines request these paths every few seconds
PRINTABLE = re.compile(rb"[\x21-\x7e]{1,128}")


class AccessLog:
    """The outermost ASGI middleware of the app.

    Gives each request an id, logs the request and counts it. Also answers 500 to requests that crash, so that these
    responses have an id, too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, request_id, status = time.perf_counter(), f"req_{secrets.token_hex(12)}", 0
        state = scope.setdefault("state", {})
        state["request_id"], state["headers"] = request_id, {}  # handlers of the request may add headers

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, seconds = message["status"], time.perf_counter() - started
                _count(scope, status, seconds)
                headers = {"x-request-id": request_id, "openai-processing-ms": str(round(seconds * 1000))}
                headers |= {"openai-version": "2020-10-01", **state["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in headers.items()),
                ]
            await send(message)

        with log_setup.about(request_id=request_id, **_given_id(scope)), _span(scope) as span:
            try:
                await self._app(scope, receive, send_with_headers)
            except Exception:
                log.exception("A request crashed")
                if not status:
                    await _crashed()(scope, receive, send_with_headers)
            finally:
                _log(scope, status, time.perf_counter() - started)
                if span:
                    span.update_name(f"{_method(scope)} {_route(scope)}")
                    span.set_attributes({"http.route": _route(scope), "http.response.status_code": status})


def _crashed() -> JSONResponse:
    message = (
        "The server had an error while processing your request. Its log says more; give the operator the x-request-id."
    )
    return JSONResponse(envelope(message, "server_error"), 500)


def _given_id(scope: Scope) -> dict[str, str]:
    """Returns the request id that the client chose (the header `x-client-request-id`), as a field for the log.

    Returns {} if the client sent no id, or an id that is too long or not printable.
    """
    given = next((value for name, value in scope["headers"] if name == b"x-client-request-id"), b"")
    return {"client_request_id": given.decode()} if PRINTABLE.fullmatch(given) else {}


def _span(scope: Scope) -> AbstractContextManager[Any]:
    """Opens a trace span for a request below /v1. If the client's header `traceparent` names a span, the new span
    becomes a child of that span. For other requests, opens no span.
    """
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), None)
    return tracing.span("request", parent=given) if scope["path"].startswith("/v1/") else nullcontext()


def _route(scope: Scope) -> str:
    """Returns the route's template, such as `/v1/files/{file_id}`. Real paths and queries may contain private data."""
    return getattr(scope.get("route"), "path", "none")


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in METHODS else "other"


def _count(scope: Scope, status: int, seconds: float) -> None:
    method, route = _method(scope), _route(scope)
    REQUESTS.labels(method, route, str(status)).inc()
    REQUEST_SECONDS.labels(method, route).observe(seconds)


def _log(scope: Scope, status: int, seconds: float) -> None:
    if (route := _route(scope)) in QUIET:
        return
    caller = scope["state"].get("caller")
    fields: dict[str, Any] = {"method": _method(scope), "route": route, "status": status}
    fields |= {"ms": round(seconds * 1000), "key_id": caller.key_id if caller else None}
    log.info("%s %s %d in %d ms, %s", *fields.values(), extra=fields)

"""The control plane's parts, wired together. Nobody else builds them."""

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import psycopg
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, InternalError, OperationalError, TimeoutError
from starlette.exceptions import HTTPException

from services import storage
from services.control_plane.attempts import api as attempts_api
from services.control_plane.attempts.reconciler import Reconciler
from services.control_plane.auth.authentication import Authentication
from services.control_plane.core.errors import ApiError, InvalidRequest, Unavailable, envelope
from services.control_plane.core.store import Store, refuses_value
from services.control_plane.core.telemetry import AUTH_FAILURES
from services.control_plane.files import api as files_api
from services.control_plane.files import model_check_api, uploads_api
from services.control_plane.files.row_check import Surveyor
from services.control_plane.http import health, metrics, unsupported
from services.control_plane.http.access_log import Access
from services.control_plane.http.dependencies import admit, check_query
from services.control_plane.http.limits import Limits
from services.control_plane.http.rate_limit import Rates
from services.control_plane.http.refusals import Refusals
from services.control_plane.http.validation import refused
from services.control_plane.jobs import api as jobs_api
from services.control_plane.jobs import plans_api, validation_api
from services.control_plane.jobs.lookups import Lookups
from services.control_plane.models import api as models_api
from services.control_plane.models import inference_api, sharing_api
from services.control_plane.models.inference import Inference
from services.control_plane.progress import api as progress_api
from services.control_plane.progress.streams import Live
from services.control_plane.ray_api import Launcher
from services.control_plane.settings import Settings
from services.control_plane.tenants import api as tenants_api
from services.control_plane.tenants import api_keys, audit
from services.control_plane.webhooks import api as webhooks_api
from services.control_plane.webhooks.outbox import Sender

log = logging.getLogger(__name__)

JOINED_AT_ONCE = 4  # uploads: each holds a connection to the database while its parts are read and written


def create_app(settings: Settings) -> FastAPI:
    """The service for one database and one Ray cluster. The database's schema must be up to date."""
    app = FastAPI(title="raydpo", lifespan=_lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.settings = settings
    checks = [Depends(admit), Depends(check_query)]
    owned = (
        files_api,
        uploads_api,
        jobs_api,
        validation_api,
        plans_api,
        sharing_api,
        models_api,
        model_check_api,
        inference_api,
        webhooks_api,
        progress_api,
    )
    for routes in (*owned, api_keys, tenants_api, audit, unsupported):
        app.include_router(routes.router, prefix="/v1", dependencies=checks)
    app.include_router(attempts_api.router)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(OSError, _on_storage_error)
    for error in (OperationalError, InterfaceError, InternalError, TimeoutError):
        app.add_exception_handler(error, _on_database_error)
    app.add_exception_handler(DataError, _on_data_error)

    async def project_of(token: str) -> str | None:  # asked when the app has its parts
        return await cast(Authentication, app.state.authentication).project_of(token)

    app.add_middleware(Limits, settings=settings, project_of=project_of)
    app.add_middleware(Access)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings = app.state.settings
    store = Store(
        settings.database_url, direct_url=settings.database_direct_url, connections=settings.database_connections
    )
    launcher = Launcher(settings, store.instance)
    app.state.store, app.state.launcher = store, launcher
    app.state.inference = Inference(store, launcher, settings)
    app.state.authentication, app.state.rates = Authentication(store, settings), Rates()
    app.state.lookups, app.state.refusals = Lookups(store), Refusals(store)
    live = app.state.live = Live(store, settings)
    sender = app.state.sender = Sender(store, settings)
    holder = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    app.state.joining = asyncio.Semaphore(JOINED_AT_ONCE)
    reconciler, surveyor = Reconciler(store, launcher, settings, holder=holder), Surveyor(store, holder=holder)
    parts = (
        reconciler,
        surveyor,
        sender,
        live,
        app.state.inference,
        app.state.authentication,
        app.state.refusals,
    )
    tasks = [asyncio.create_task(part.run(), name=type(part).__name__) for part in parts]
    for task in tasks:
        task.add_done_callback(_end_process)
    try:
        yield
    finally:
        for task in tasks:
            task.remove_done_callback(_end_process)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await sender.close()
        await app.state.inference.close()
        await launcher.close()
        await store.close()


def _end_process(part: asyncio.Task[None]) -> None:
    """A part runs until it is cancelled. Where one ends by itself the process ends, too, and is started anew."""
    if not part.cancelled():
        log.critical("%s has ended, and the process ends with it", part.get_name(), exc_info=part.exception())
        os.kill(os.getpid(), signal.SIGTERM)


async def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    if error.status == 401:
        AUTH_FAILURES.labels(error.code).inc()
    await cast(Refusals, request.app.state.refusals).note(request, error)
    return error.response()


async def _on_invalid_body(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's 422 as OpenAI's 400. The first part of a location is where it was: body, query, path."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        message = f"The body is not valid JSON: {first['ctx']['error']}."
        return JSONResponse(envelope(message, "invalid_request_error"), 400)
    return refused(first, tuple(first["loc"][1:])).response()


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # while FastAPI read the body
        return await _on_api_error(request, error.__cause__)
    if isinstance(error.__cause__, RecursionError):
        return InvalidRequest("The body has too many lists or objects in one another; send fewer.").response()
    if isinstance(error.__cause__, ValueError):  # a byte that is no UTF-8, a number of thousands of digits
        return InvalidRequest(f"The body cannot be read: {error.__cause__}.").response()
    message = f"{error.detail}: {request.method} {request.url.path}"
    return JSONResponse(envelope(message, "invalid_request_error"), error.status_code, headers=error.headers)


async def _on_storage_error(request: Request, error: Exception) -> JSONResponse:
    if storage.is_full(error):
        log.error("Storage or TMPDIR is full: %s", error)
        message = "The service's storage is full. Nothing of the request was kept; its operator has to make room."
        return Unavailable(message, retry_after=30, code="storage_full").response()
    if storage.is_away(error):
        log.error("Storage does not answer, or refuses: %s", error)
        message = "The service's storage does not answer. Nothing of the request was kept; send it again."
        return Unavailable(message, retry_after=5, code="storage_unavailable").response()
    raise error


async def _on_database_error(request: Request, error: Exception) -> JSONResponse:
    """The database is down or takes no writes, or all connections to it are taken: the client comes back by itself."""
    if isinstance(error, DBAPIError) and refuses_value(error):
        return await _on_data_error(request, error)
    log.warning("The database does not answer: %s", error)
    if isinstance(error, DBAPIError) and isinstance(error.orig, psycopg.errors.QueryCanceled):
        message = "The request waited too long for another that works on the same; nothing was changed."
        return Unavailable(message, retry_after=30, code="database_unavailable").response()
    message = "The database does not answer; nothing was changed."
    return Unavailable(message, retry_after=2, code="database_unavailable").response()


async def _on_data_error(request: Request, error: Exception) -> JSONResponse:
    """What the request says cannot be kept, nor be looked for."""
    assert isinstance(error, DBAPIError)
    log.warning("A value was refused by the database: %s", error.orig)
    message = "A value in the request cannot be kept: it holds a NUL character, or is too large; change it."
    return InvalidRequest(message).response()

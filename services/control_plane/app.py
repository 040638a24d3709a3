"""Builds the control plane: the FastAPI app, the database, the client of Ray, and the background tasks.

No other module builds these parts or connects them.
"""

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

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
from services.control_plane.core.leases import Leaseholder
from services.control_plane.core.store import Store, refuses_value
from services.control_plane.core.telemetry import AUTH_FAILURES
from services.control_plane.core.turns import Turns
from services.control_plane.evaluations import api as evaluations_api
from services.control_plane.evaluations.runner import EvaluationRunner
from services.control_plane.feedback import api as feedback_api
from services.control_plane.files import api as files_api
from services.control_plane.files import model_check_api, uploads_api
from services.control_plane.files.row_check import RowChecker
from services.control_plane.http import health, metrics, unsupported
from services.control_plane.http.access_log import AccessLog
from services.control_plane.http.dependencies import admit, check_query
from services.control_plane.http.limits.limits import Limits
from services.control_plane.http.limits.rate_limit import InFlight, RateLimits
from services.control_plane.http.refusals import Refusals
from services.control_plane.http.validation import refused
from services.control_plane.inference import api as inference_api
from services.control_plane.inference.inference import Inference
from services.control_plane.jobs import api as jobs_api
from services.control_plane.jobs import validation_api
from services.control_plane.jobs.checkpoint_evaluations.runner import JobEvaluationRunner
from services.control_plane.jobs.deletion import api as deletion_api
from services.control_plane.jobs.lookups import JobReader
from services.control_plane.jobs.plans import api as plans_api
from services.control_plane.models import api as models_api
from services.control_plane.models import sharing_api
from services.control_plane.models.deployments import api as deployments_api
from services.control_plane.models.deployments.recent import RecentModels
from services.control_plane.page import api as page_api
from services.control_plane.page import sign_in_api
from services.control_plane.progress import api as progress_api
from services.control_plane.progress.streams import Streams
from services.control_plane.ray_api import RayApi
from services.control_plane.rewards import api as rewards_api
from services.control_plane.rewards.scoring import Scoring
from services.control_plane.rounds import api as rounds_api
from services.control_plane.rounds.runner import RoundsRunner
from services.control_plane.settings import Settings
from services.control_plane.sweeps import api as sweeps_api
from services.control_plane.sweeps.runner import SweepRunner
from services.control_plane.tenants import api as tenants_api
from services.control_plane.tenants import api_keys, audit_api, usage_api
from services.control_plane.tenants.usage import UsageRecorder
from services.control_plane.webhooks import api as webhooks_api
from services.control_plane.webhooks.outbox import Sender

log = logging.getLogger(__name__)

JOINED_AT_ONCE = 4  # the most uploads that are joined at the same time; each holds a database connection meanwhile
STORED_AT_ONCE = 16  # the most bodies that are written to storage at the same time; each holds one of 40 threads


def create_app(settings: Settings) -> FastAPI:
    """Returns the control plane's FastAPI app. The database must have the newest schema before the app starts."""
    app = FastAPI(title="raydpo", lifespan=_lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.settings = settings
    checks = [Depends(admit), Depends(check_query)]
    owned = (
        files_api,
        uploads_api,
        jobs_api,
        validation_api,
        deletion_api,
        plans_api,
        sharing_api,
        models_api,
        deployments_api,
        model_check_api,
        inference_api,
        rewards_api,
        evaluations_api,
        sweeps_api,
        rounds_api,
        feedback_api,
        webhooks_api,
        progress_api,
    )
    for routes in (*owned, api_keys, tenants_api, audit_api, usage_api, unsupported):
        app.include_router(routes.router, prefix="/v1", dependencies=checks)
    app.include_router(sign_in_api.router, prefix="/v1", dependencies=[Depends(check_query)])
    app.include_router(attempts_api.router)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(page_api.router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(OSError, _on_storage_error)
    for error in (OperationalError, InterfaceError, InternalError, TimeoutError):
        app.add_exception_handler(error, _on_database_error)
    app.add_exception_handler(DataError, _on_data_error)

    async def project_of(token: str) -> str | None:  # only requests call this; app.state has its parts by then
        return await cast(Authentication, app.state.authentication).project_of(token)

    app.add_middleware(Limits, settings=settings, project_of=project_of)
    app.add_middleware(AccessLog)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Builds the service's parts, such as the database's connections and the client of Ray, when the app starts. Runs
    the background tasks while the app runs. Closes everything when the app ends.
    """
    settings = app.state.settings
    store = Store(
        settings.database_url, direct_url=settings.database_direct_url, connections=settings.database_connections
    )
    ray_api = RayApi(settings, store.instance)
    app.state.store, app.state.ray_api = store, ray_api
    app.state.recent_models = RecentModels()
    app.state.inference = Inference(store, ray_api, settings, app.state.recent_models)
    app.state.scoring = Scoring(app.state.inference)
    app.state.authentication, app.state.rate_limits = Authentication(store, settings), RateLimits()
    app.state.token_limits, app.state.usage = RateLimits("tokens"), UsageRecorder(store)
    app.state.in_flight = InFlight()
    app.state.job_reader, app.state.refusals = JobReader(store), Refusals(store)
    streams = app.state.streams = Streams(store, settings)
    sender = app.state.sender = Sender(store, settings)
    holder = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    app.state.joining, app.state.storing = Turns(JOINED_AT_ONCE), Turns(STORED_AT_ONCE)
    evaluation_runner = EvaluationRunner(
        store, settings, app.state.inference, app.state.scoring, app.state.usage, app.state.token_limits
    )
    reconciler = Reconciler(store, ray_api, settings, holder=holder)
    app.state.wake_reconciler = reconciler.wake
    parts = (
        reconciler,
        sender,
        streams,
        app.state.inference,
        app.state.authentication,
        app.state.refusals,
        app.state.usage,
    )
    tasks = [asyncio.create_task(part.run(), name=type(part).__name__) for part in parts]
    sweep_runner, rounds_runner = SweepRunner(store, settings, ray_api), RoundsRunner(store, settings, ray_api)
    job_evaluations = JobEvaluationRunner(store, settings)
    for kind in (RowChecker(store), evaluation_runner, job_evaluations, sweep_runner, rounds_runner):
        leaseholder = Leaseholder[Any](store, kind, holder=holder)
        tasks.append(asyncio.create_task(leaseholder.run(), name=type(kind).__name__))
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
        await evaluation_runner.close()
        await ray_api.close()
        await store.close()


def _end_process(part: asyncio.Task[None]) -> None:
    """Ends this process if the background task `part` has ended by itself, without being cancelled.

    Whatever runs the process, such as Kubernetes, must start it again.
    """
    if not part.cancelled():
        log.critical(
            "The background task %s of the service has ended unexpectedly, so the whole process ends",
            part.get_name(),
            exc_info=part.exception(),
        )
        os.kill(os.getpid(), signal.SIGTERM)


async def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    if error.status == 401:
        AUTH_FAILURES.labels(error.code).inc()
    await cast(Refusals, request.app.state.refusals).note(request, error)
    return error.response()


async def _on_invalid_body(request: Request, error: Exception) -> JSONResponse:
    """Answers 400, in OpenAI's form, to a request that FastAPI finds invalid. FastAPI itself would answer 422."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]  # its location begins with a part of the request: body, query or path
    if first["type"] == "json_invalid":
        message = f"The body of the request is not valid JSON: {first['ctx']['error']}."
        return JSONResponse(envelope(message, "invalid_request_error"), 400)
    body = getattr(request.scope.get("route"), "body_field", None)
    kind = body.field_info.annotation if body else None
    return refused(first, tuple(first["loc"][1:]), kind=kind).response()


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # the ApiError was raised while FastAPI read the body
        return await _on_api_error(request, error.__cause__)
    if isinstance(error.__cause__, RecursionError):
        return InvalidRequest("The body of the request nests lists or objects too deeply; use fewer levels.").response()
    if isinstance(error.__cause__, ValueError):  # a byte that is no UTF-8, a number of thousands of digits
        return InvalidRequest(f"The body of the request cannot be read as JSON: {error.__cause__}.").response()
    message = f"{error.detail}: {request.method} {request.url.path}"
    return JSONResponse(envelope(message, "invalid_request_error"), error.status_code, headers=error.headers)


async def _on_storage_error(request: Request, error: Exception) -> JSONResponse:
    """Answers 503 if the storage is full or does not answer. Any other OSError is raised again."""
    if storage.is_full(error):
        log.error("The storage, or the folder TMPDIR, is full: %s", error)
        message = (
            "The service's storage is full, so nothing of the request was kept. Ask the operator to free some space."
        )
        return Unavailable(message, retry_after=30, code="storage_full").response()
    if storage.is_away(error):
        log.error("The storage does not answer, or refuses access: %s", error)
        message = "The service's storage does not answer, so nothing of the request was kept. Send the request again."
        return Unavailable(message, retry_after=5, code="storage_unavailable").response()
    raise error


async def _on_database_error(request: Request, error: Exception) -> JSONResponse:
    """Answers 503 if the database is down, refuses writes or has no free connection. OpenAI's clients retry a 503."""
    if isinstance(error, DBAPIError) and refuses_value(error):
        return await _on_data_error(request, error)
    log.warning("The database does not answer: %s", error)
    if isinstance(error, DBAPIError) and isinstance(error.orig, psycopg.errors.QueryCanceled):
        message = (
            "The request waited too long for another request that changes the same object. Nothing was changed; "
            "try again."
        )
        return Unavailable(message, retry_after=30, code="database_unavailable").response()
    message = "The service's database does not answer. Nothing was changed; send the request again."
    return Unavailable(message, retry_after=2, code="database_unavailable").response()


async def _on_data_error(request: Request, error: Exception) -> JSONResponse:
    """Answers 400 if the request holds a value that the database cannot store or compare with."""
    assert isinstance(error, DBAPIError)
    log.warning("The database refused a value of a request: %s", error.orig)
    message = (
        "A value in the request cannot be stored, because it has a NUL character or is too large; change the value."
    )
    return InvalidRequest(message).response()

"""Defines the FastAPI dependencies of routes: the parts of the service that `app` built, and the caller of the
request."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Annotated, Any, cast

from fastapi import Depends, Query, Request
from fastapi.dependencies.utils import get_flat_dependant
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel

from services.control_plane.auth import scopes
from services.control_plane.auth.authentication import Authentication
from services.control_plane.auth.keys import Caller
from services.control_plane.core.errors import InvalidRequest, Unauthorized
from services.control_plane.core.store import ProjectStore, Store
from services.control_plane.http.idempotency import IdempotentRequest
from services.control_plane.http.limits.rate_limit import InFlight, RateLimits
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings

bearer = HTTPBearer(auto_error=False)
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
Limit = Annotated[int, Query(ge=1, le=100)]  # items on one page


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


async def _store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


async def _ray_api(request: Request) -> RayApi:
    return cast(RayApi, request.app.state.ray_api)


async def _wake_reconciler(request: Request) -> Callable[[], None]:
    return cast(Callable[[], None], request.app.state.wake_reconciler)


SettingsPart = Annotated[Settings, Depends(_settings)]
ServiceStorePart = Annotated[Store, Depends(_store)]
RayApiPart = Annotated[RayApi, Depends(_ray_api)]
WakePart = Annotated[Callable[[], None], Depends(_wake_reconciler)]  # makes the reconciler look at its work at once


async def admit(request: Request, credentials: Bearer) -> Caller:
    """Checks the API key of the request, and returns the caller (the sender of the request).

    Raises an ApiError if the key is missing or unknown, has reached its rate limit, or lacks the scope (permission)
    that the route needs. The function takes the parts of the service from `app.state`. If these parts were parameters
    of the function, FastAPI would look them up again for each dependency that needs the caller.
    """
    parts = request.app.state
    if credentials is None or not credentials.credentials:
        message = "You didn't provide an API key. Send it in the header `Authorization: Bearer YOUR_KEY`."
        raise Unauthorized(message, code="invalid_api_key")
    caller = request.state.caller = await cast(Authentication, parts.authentication).caller(credentials.credentials)
    settings = cast(Settings, parts.settings)
    _check_header(request, "organization", settings.organization)
    _check_header(request, "project", caller.project_id)
    if limit := caller.requests_per_minute or settings.requests_per_minute:
        request.state.headers |= cast(RateLimits, parts.rate_limits).take(caller.key_id, limit)
    scopes.check(caller, request.method, request.scope["route"].path)
    if request.scope["route"].path in scopes.INFERENCE:
        if limit := tokens_per_minute(caller, settings):
            request.state.headers |= cast(RateLimits, parts.token_limits).look(caller.key_id, limit)
        in_flight = cast(InFlight, parts.in_flight)
        request.state.headers |= in_flight.enter(caller.key_id, settings.requests_at_once)
        request.state.at_end.append(partial(in_flight.leave, caller.key_id))
    return caller


def tokens_per_minute(caller: Caller, settings: Settings) -> int | None:
    """Returns how many tokens per minute the caller may use: the limit of its API key, or else the limit in the
    settings.

    Returns None if neither sets a limit.
    """
    return caller.tokens_per_minute or settings.tokens_per_minute


def _check_header(request: Request, what: str, keys_own: str) -> None:
    """Raises Unauthorized if the header `OpenAI-Organization` or `OpenAI-Project` has another value than `keys_own`.

    `what` says which of the two headers to check: `organization` or `project`. `keys_own` is the organization or the
    project of the request's API key. A request without the header passes.
    """
    if (named := request.headers.get(f"openai-{what}")) not in (None, keys_own):
        message = (
            f"The header OpenAI-{what.capitalize()} is '{named}', but your key belongs to '{keys_own}'; "
            "leave the header out."
        )
        raise Unauthorized(message, code=f"mismatched_{what}")


CallerPart = Annotated[Caller, Depends(admit)]


def _names(param: Any) -> Collection[str]:
    """Returns the names of the query parameters from which FastAPI fills one parameter (`param`) of a route function.

    These are several names if the type of `param` is a pydantic model, and otherwise one name.
    """
    kind = param.field_info.annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [field.alias or name for name, field in kind.model_fields.items()]
    return [param.alias]


async def check_query(request: Request) -> None:
    """Raises InvalidRequest for a query parameter that the route does not read.

    A query parameter with the name `a[b]` counts as `a`.
    """
    route = cast(APIRoute, request.scope["route"])
    if not request.query_params or not route.include_in_schema:
        return
    known = {name for param in get_flat_dependant(route.dependant).query_params for name in _names(param)}
    for name in request.query_params:
        if name.partition("[")[0] not in known:
            raise InvalidRequest(f"Unknown parameter: '{name:.80}'.", param=name[:80], code="unknown_parameter")


async def _project_store(request: Request, caller: CallerPart) -> ProjectStore:
    return ProjectStore(request.app.state.store, caller.project_id)


StorePart = Annotated[ProjectStore, Depends(_project_store)]


async def _idempotent(request: Request, caller: CallerPart) -> IdempotentRequest:
    return IdempotentRequest(request, await _project_store(request, caller), caller)


IdempotentPart = Annotated[IdempotentRequest, Depends(_idempotent)]

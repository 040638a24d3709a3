"""What routes are given: the parts wired in `app`, and the caller's key checked."""

from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from services.control_plane import scopes
from services.control_plane.authentication import Authentication
from services.control_plane.errors import Forbidden, Unauthorized
from services.control_plane.inference import Inference
from services.control_plane.keys import Caller
from services.control_plane.launcher import Launcher
from services.control_plane.once import Once
from services.control_plane.rates import Rates
from services.control_plane.sender import Sender
from services.control_plane.settings import Settings
from services.control_plane.store import ProjectStore, Store

bearer = HTTPBearer(auto_error=False)
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


def _store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


def _launcher(request: Request) -> Launcher:
    return cast(Launcher, request.app.state.launcher)


def _inference(request: Request) -> Inference:
    return cast(Inference, request.app.state.inference)


def _sender(request: Request) -> Sender:
    return cast(Sender, request.app.state.sender)


SettingsPart = Annotated[Settings, Depends(_settings)]
ServiceStorePart = Annotated[Store, Depends(_store)]
LauncherPart = Annotated[Launcher, Depends(_launcher)]
InferencePart = Annotated[Inference, Depends(_inference)]
SenderPart = Annotated[Sender, Depends(_sender)]


async def admit(request: Request, settings: SettingsPart, credentials: Bearer) -> Caller:
    """Whoever asks, if the key lives, is within its rate, and has the scope that the route needs."""
    if credentials is None or not credentials.credentials:
        message = "You didn't provide an API key. Send it in the header `Authorization: Bearer YOUR_KEY`."
        raise Unauthorized(message, code="invalid_api_key")
    authentication = cast(Authentication, request.app.state.authentication)
    caller = request.state.caller = await authentication.caller(credentials.credentials)
    _check_named(request, "organization", settings.organization)
    _check_named(request, "project", caller.project_id)
    if limit := caller.requests_per_minute or settings.requests_per_minute:
        request.state.headers |= cast(Rates, request.app.state.rates).take(caller.key_id, limit)
    _check_scope(request, caller)
    return caller


def _check_named(request: Request, what: str, own: str) -> None:
    """OpenAI's clients may name where they believe the key to be."""
    if (named := request.headers.get(f"openai-{what}")) not in (None, own):
        message = f"OpenAI-{what.capitalize()} is '{named}', but the key is of '{own}'; leave the header out."
        raise Unauthorized(message, code=f"mismatched_{what}")


def _check_scope(request: Request, caller: Caller) -> None:
    path = request.scope["route"].path
    if (scope := scopes.needed(request.method, path)) not in caller.scopes:
        has = ", ".join(sorted(caller.scopes)) or "none"
        message = f"{request.method} {path} needs a key with the scope '{scope}'; this one has {has}."
        raise Forbidden(message, code="missing_scope")


CallerPart = Annotated[Caller, Depends(admit)]


def _project_store(store: ServiceStorePart, caller: CallerPart) -> ProjectStore:
    return ProjectStore(store, caller.project_id)


StorePart = Annotated[ProjectStore, Depends(_project_store)]


def _once(request: Request, store: StorePart, caller: CallerPart) -> Once:
    return Once(request, store, caller)


OncePart = Annotated[Once, Depends(_once)]

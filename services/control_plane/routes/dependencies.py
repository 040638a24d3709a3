"""What routes are given: the parts wired in `app`, and the caller's key checked."""

from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from services.control_plane import keys
from services.control_plane.errors import Unauthorized
from services.control_plane.inference import Inference
from services.control_plane.keys import Caller
from services.control_plane.launcher import Launcher
from services.control_plane.live import Live
from services.control_plane.once import Once
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


def _live(request: Request) -> Live:
    return cast(Live, request.app.state.live)


def _sender(request: Request) -> Sender:
    return cast(Sender, request.app.state.sender)


SettingsPart = Annotated[Settings, Depends(_settings)]
ServiceStorePart = Annotated[Store, Depends(_store)]
LauncherPart = Annotated[Launcher, Depends(_launcher)]
InferencePart = Annotated[Inference, Depends(_inference)]
LivePart = Annotated[Live, Depends(_live)]
SenderPart = Annotated[Sender, Depends(_sender)]


async def authenticate(
    request: Request, store: ServiceStorePart, settings: SettingsPart, credentials: Bearer
) -> Caller:
    """Raises Unauthorized unless the bearer token is a live key."""
    if credentials is None or not credentials.credentials:
        message = "You didn't provide an API key. Send it in the header `Authorization: Bearer YOUR_KEY`."
        raise Unauthorized(message, code="invalid_api_key")
    async with store.begin() as session:
        request.state.caller = await keys.authenticate(session, credentials.credentials, settings)
    return cast(Caller, request.state.caller)


CallerPart = Annotated[Caller, Depends(authenticate)]


def _project_store(store: ServiceStorePart, caller: CallerPart) -> ProjectStore:
    return ProjectStore(store, caller.project_id)


StorePart = Annotated[ProjectStore, Depends(_project_store)]


def _once(request: Request, store: StorePart, caller: CallerPart) -> Once:
    return Once(request, store, caller)


OncePart = Annotated[Once, Depends(_once)]

"""What routes are given: the parts wired in `app`, and the caller's key checked."""

import secrets
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from services.control_plane.errors import Unauthorized
from services.control_plane.inference import Inference
from services.control_plane.launcher import Launcher
from services.control_plane.settings import Settings
from services.control_plane.store import Store

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


SettingsPart = Annotated[Settings, Depends(_settings)]
StorePart = Annotated[Store, Depends(_store)]
LauncherPart = Annotated[Launcher, Depends(_launcher)]
InferencePart = Annotated[Inference, Depends(_inference)]


def require_key(settings: SettingsPart, credentials: Bearer) -> None:
    """Raises Unauthorized unless the bearer token is the API key."""
    given = credentials.credentials if credentials else ""
    if not given:
        message = "You didn't provide an API key. Send it in the header `Authorization: Bearer YOUR_KEY`."
        raise Unauthorized(message, code="invalid_api_key")
    if not secrets.compare_digest(given.encode(), settings.api_key.get_secret_value().encode()):
        shown = f"{given[:3]}…{given[-4:]}" if len(given) >= 16 else "the one sent"
        message = f"Incorrect API key provided: {shown}. The service printed where its key lies when it started."
        raise Unauthorized(message, code="invalid_api_key")

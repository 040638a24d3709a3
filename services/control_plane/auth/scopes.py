"""Checks that an API key has the scope (the kind of permission) that a route needs."""

from services.control_plane.auth.keys import Caller
from services.control_plane.core.errors import Forbidden
from services.control_plane.settings import Scope

ADMIN = ("/v1/x/keys", "/v1/x/projects", "/v1/x/audit", "/v1/x/usage", "/v1/fine_tuning/checkpoints")
INFERENCE = ("/v1/chat/completions", "/v1/completions", "/v1/x/rewards")


def check(caller: Caller, method: str, path: str) -> None:
    """Raises Forbidden unless the caller's API key has the scope (the permission) that the request needs.

    `method` is the request's HTTP method, and `path` the template of its route, such as `/v1/files/{file_id}`.
    """
    if (scope := needed(method, path)) not in caller.scopes:
        has = ", ".join(sorted(caller.scopes)) or "none"
        given = (
            f"your key has the scopes {has}; ask an admin for a key."
            if caller.scopes_claim is None
            else f"your token has the scopes {has}, from its claim '{caller.scopes_claim}'; ask the service's operator."
        )
        message = f"{method} {path} needs a key with the scope '{scope}', but {given}"
        raise Forbidden(message, code="missing_scope")


def needed(method: str, path: str) -> Scope:
    """Returns the scope (the permission) that a request needs.

    `method` is the request's HTTP method, and `path` the template of its route, such as `/v1/files/{file_id}`.
    """
    if _below(path, ADMIN):
        return "admin"
    if _below(path, INFERENCE):
        return "inference"
    return "read" if method in ("GET", "HEAD") else "write"


def _below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)

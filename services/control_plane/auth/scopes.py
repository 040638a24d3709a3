"""Which scope a route needs, for all routes in one place."""

from services.control_plane.auth.keys import Scope

ADMIN = ("/v1/x/keys", "/v1/x/projects", "/v1/x/audit", "/v1/fine_tuning/checkpoints")
INFERENCE = ("/v1/chat/completions", "/v1/completions")


def needed(method: str, path: str) -> Scope:
    """Returns the scope that a request needs. `path` is the route's template, such as `/v1/files/{file_id}`."""
    if _below(path, ADMIN):
        return "admin"
    if _below(path, INFERENCE):
        return "inference"
    return "read" if method in ("GET", "HEAD") else "write"


def _below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)

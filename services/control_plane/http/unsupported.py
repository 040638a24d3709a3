"""Refuses parts of OpenAI's API that are not offered by their names, instead of with a bare 404."""

from fastapi import APIRouter, Request

from services.control_plane.core.errors import InvalidRequest

router = APIRouter()

INSTEAD = {
    "/fine_tuning/alpha": "there are no graders",
    "/chat/completions": "completions are not kept",
}


async def refuse(request: Request) -> None:
    """Raises InvalidRequest that says what is not offered."""
    part = next(part for part in INSTEAD if request.url.path.startswith(f"/v1{part}"))
    message = f"{request.method} {request.url.path} is not supported: {INSTEAD[part]}."
    raise InvalidRequest(message, param=part.removeprefix("/"), code="unsupported_value")


for part in INSTEAD:
    for path in (part, f"{part}/{{rest:path}}"):
        router.add_api_route(path, refuse, methods=["GET", "POST", "DELETE"], include_in_schema=False)

"""The routes of OpenAI's API that the service does not offer. They answer 400 with the reason instead of a bare 404."""

from fastapi import APIRouter, Request

from services.control_plane.core.errors import InvalidRequest

router = APIRouter()

INSTEAD = {
    "/fine_tuning/alpha": "the service has no graders",
    "/chat/completions": "the service does not store chat completions",
}


async def refuse(request: Request) -> None:
    """Raises InvalidRequest, which names the part of OpenAI's API that the service does not offer, and the reason."""
    part = next(part for part in INSTEAD if request.url.path.startswith(f"/v1{part}"))
    message = f"{request.method} {request.url.path} is not supported: {INSTEAD[part]}."
    raise InvalidRequest(message, param=part.removeprefix("/"), code="unsupported_value")


for part in INSTEAD:
    for path in (part, f"{part}/{{rest:path}}"):
        router.add_api_route(path, refuse, methods=["GET", "POST", "DELETE"], include_in_schema=False)

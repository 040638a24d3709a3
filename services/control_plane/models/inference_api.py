"""/v1/chat/completions and /v1/completions, forwarded to Ray Serve."""

from fastapi import APIRouter, Response

from services.control_plane.http.dependencies import InferencePart, StorePart
from services.control_plane.jobs.requests import InferenceBody

router = APIRouter()


@router.post("/chat/completions")
async def chat_completions(inference: InferencePart, store: StorePart, body: InferenceBody) -> Response:
    return await inference.forward(store, "chat/completions", body.model_dump(exclude_unset=True))


@router.post("/completions")
async def completions(inference: InferencePart, store: StorePart, body: InferenceBody) -> Response:
    return await inference.forward(store, "completions", body.model_dump(exclude_unset=True))

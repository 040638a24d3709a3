"""/v1/chat/completions and /v1/completions are forwarded to Ray Serve."""

from typing import Annotated, cast

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict

from services.control_plane.http.dependencies import StorePart
from services.control_plane.http.validation import Text
from services.control_plane.models.inference import Inference

router = APIRouter()


async def _inference(request: Request) -> Inference:
    return cast(Inference, request.app.state.inference)


InferencePart = Annotated[Inference, Depends(_inference)]


class InferenceBody(BaseModel):
    """The part of a completion's body that the control plane reads. The model's server checks the rest."""

    model_config = ConfigDict(extra="allow")
    model: Text
    stream: bool | None = False


@router.post("/chat/completions")
async def chat_completions(inference: InferencePart, store: StorePart, body: InferenceBody) -> Response:
    return await inference.forward(store, "chat/completions", body.model_dump(exclude_unset=True))


@router.post("/completions")
async def completions(inference: InferencePart, store: StorePart, body: InferenceBody) -> Response:
    return await inference.forward(store, "completions", body.model_dump(exclude_unset=True))

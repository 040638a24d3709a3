"""/v1/chat/completions and /v1/completions are forwarded to Ray Serve."""

import asyncio
import math
from collections.abc import Coroutine
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.http.dependencies import StorePart
from services.control_plane.http.validation import Text
from services.control_plane.models.inference import Inference

router = APIRouter()

MOST_NESTED = 100  # objects and lists in one another: what reads the body next may bear no more
CLIENT_CLOSED_REQUEST = 499  # for the log: nobody reads it


async def _inference(request: Request) -> Inference:
    return cast(Inference, request.app.state.inference)


InferencePart = Annotated[Inference, Depends(_inference)]


class InferenceBody(BaseModel):
    """The part of a completion's body that the control plane reads. The model's server checks the rest."""

    model_config = ConfigDict(extra="allow")
    model: Text
    stream: bool | None = False


@router.post("/chat/completions")
async def chat_completions(
    request: Request, inference: InferencePart, store: StorePart, body: InferenceBody
) -> Response:
    return await _forward(request, inference, store, "chat/completions", body)


@router.post("/completions")
async def completions(request: Request, inference: InferencePart, store: StorePart, body: InferenceBody) -> Response:
    return await _forward(request, inference, store, "completions", body)


async def _forward(
    request: Request, inference: Inference, store: StorePart, path: str, body: InferenceBody
) -> Response:
    _check({"model": body.model} | (body.model_extra or {}))
    raw, streams = await request.body(), bool(body.stream)
    return await _while_connected(request, inference.forward(store, path, body.model, raw, streams=streams))


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The answer; its work ends as soon as the client leaves."""
    answering, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check(body: dict[str, Any]) -> None:
    """Raises InvalidRequest, with the field, for what Python's JSON reads and no other's does."""
    left: list[tuple[str, int, Any]] = [("", 0, body)]
    while left:
        where, depth, value = left.pop()
        if depth > MOST_NESTED:
            field = where.partition(".")[0]
            raise InvalidRequest(f"'{field}' has more than {MOST_NESTED} lists or objects in one another.", param=field)
        if isinstance(value, dict):
            left += [(f"{where}.{_text(where, key)}".lstrip("."), depth + 1, each) for key, each in value.items()]
        elif isinstance(value, list):
            left += [(f"{where}.{number}", depth + 1, each) for number, each in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(
                f"'{where}' is {value}, which is no number in JSON, or too large for one.", param=where
            )
        elif isinstance(value, str):
            _text(where, value)


def _text(where: str, text: str) -> str:
    """The text. Raises InvalidRequest where it holds half a character."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise InvalidRequest(f"'{where}' holds {half}, half a character; send both halves.", param=where) from None
    return text

"""The routes /v1/chat/completions and /v1/completions, which forward requests to the models on Ray Serve."""

import math
from collections.abc import Coroutine
from functools import partial
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.http.dependencies import StorePart, tokens_per_minute
from services.control_plane.http.limits.rate_limit import RateLimits
from services.control_plane.http.validation import Text
from services.control_plane.inference.inference import Inference
from services.control_plane.inference.metering import Meter, asking_for_usage, asks_for_usage
from services.control_plane.inference.streaming import while_connected
from services.control_plane.tenants.usage import UsageRecorder

router = APIRouter()

MOST_NESTED = 100  # levels of objects and lists in a body; vLLM may not parse deeper ones
CLIENT_CLOSED_REQUEST = 499  # a status that only the access log shows, because the client has left


async def _inference(request: Request) -> Inference:
    return cast(Inference, request.app.state.inference)


InferencePart = Annotated[Inference, Depends(_inference)]


class InferenceBody(BaseModel):
    """The fields of a request for a completion that the control plane itself reads: the model's name, and whether the
    answer is streamed. vLLM checks all other fields.
    """

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
    fields = body.model_extra or {}
    _check({"model": body.model} | fields)
    raw, streams = await request.body(), bool(body.stream)
    shows_usage = not streams or asks_for_usage(fields.get("stream_options"))
    meter = Meter(partial(note, request, body.model), shows_usage=shows_usage)
    raw = raw if shows_usage else asking_for_usage(raw)
    return await answered(request, inference.forward(store, path, body.model, raw, meter, streams=streams))


def note(
    request: Request, model_id: str, prompt_tokens: int, completion_tokens: int, accelerator_seconds: float
) -> None:
    """Adds an answer's tokens and its GPU seconds (`accelerator_seconds`) to the recorded usage of the API key that
    sent the request.

    If the key has a limit of tokens per minute, the tokens count against that limit as well.
    """
    parts, caller = request.app.state, request.state.caller
    if limit := tokens_per_minute(caller, parts.settings):
        cast(RateLimits, parts.token_limits).count(caller.key_id, limit, prompt_tokens + completion_tokens)
    cast(UsageRecorder, parts.usage).add(
        caller.project_id,
        caller.key_id,
        model_id,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        accelerator_seconds=accelerator_seconds,
    )


async def answered(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Runs `work`, which makes the response to this request, and returns the response.

    Cancels `work` as soon as the client disconnects; the response then is empty and has the status 499.
    """
    return await while_connected(request.receive, work) or Response(status_code=CLIENT_CLOSED_REQUEST)


def _check(body: dict[str, Any]) -> None:
    """Raises InvalidRequest, which names the field, for a value in a request's JSON object that not every JSON parser
    takes.

    Python's parser accepts NaN, infinity, halves of surrogate pairs and deep nesting; other parsers refuse them.
    """
    left: list[tuple[str, int, Any]] = [("", 0, body)]
    while left:
        where, depth, value = left.pop()
        if depth > MOST_NESTED:
            field = where.partition(".")[0]
            raise InvalidRequest(
                f"The field '{field}' nests lists or objects more than {MOST_NESTED} levels deep; use fewer levels.",
                param=field,
            )
        if isinstance(value, dict):
            left += [(f"{where}.{_text(where, key)}".lstrip("."), depth + 1, each) for key, each in value.items()]
        elif isinstance(value, list):
            left += [(f"{where}.{number}", depth + 1, each) for number, each in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(
                f"The field '{where}' is {value}; send a finite number, because JSON has no NaN and no infinity.",
                param=where,
            )
        elif isinstance(value, str):
            _text(where, value)


def _text(where: str, text: str) -> str:
    """Returns `text` unchanged. Raises InvalidRequest, which names the field `where`, if the text holds half of a
    surrogate pair."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise InvalidRequest(
                f"The field '{where}' has {half}, which is half of a character (a surrogate); "
                "send both halves or none.",
                param=where,
            ) from None
    return text

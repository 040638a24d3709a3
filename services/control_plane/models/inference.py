"""Forwards completions to Ray Serve. A model is loaded on first use. Errors come back in OpenAI's envelope."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import Response
from fastapi.responses import StreamingResponse

from services.control_plane.core.errors import ApiError, InvalidRequest, NotFound, TooLarge, Unavailable
from services.control_plane.core.store import ProjectStore, Store
from services.control_plane.models import deployments, models
from services.control_plane.models.models import NamedModel
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings

RETRY_AFTER_SECONDS = 15
TOUCH_SECONDS = 10.0  # the use of a model is written at most this often
REFUSALS: dict[int, type[InvalidRequest | NotFound | TooLarge]] = {400: InvalidRequest, 404: NotFound, 413: TooLarge}


class Inference:
    """Forwards OpenAI's completion calls to the model's Serve application."""

    def __init__(self, store: Store, ray_api: RayApi, settings: Settings) -> None:
        self._store, self._ray_api, self._settings = store, ray_api, settings
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
        self._serve = httpx.AsyncClient(timeout=httpx.Timeout(600, connect=5), limits=limits)
        self._touched: dict[str, float] = {}

    async def close(self) -> None:
        await self._serve.aclose()

    async def forward(self, caller: ProjectStore, path: str, body: dict[str, Any]) -> Response:
        """Answers `POST /v1/<path>` with the model that `body` names. A stream stays a stream."""
        async with caller.begin() as session:
            model = await models.find(session, self._settings, body["model"])
        if model.num_outputs:
            message = f"'{model.id}' is a reward model: it scores texts and writes none. Name a policy or a base model."
            raise InvalidRequest(message, param="model", code="invalid_value")
        base_url = await self._wait_until_served(model)
        app = await self._ray_api.own_name(model.app_name)
        request = self._serve.build_request("POST", f"{base_url}/{app}/v1/{path}", json=body)
        try:
            answer = await self._serve.send(request, stream=True)
        except httpx.TransportError:
            raise self._unavailable(model, "did not answer") from None
        if answer.status_code != 200:
            await answer.aread()
            raise self._refusal(model, answer)
        if body.get("stream"):
            return StreamingResponse(_chunks(answer), media_type="text/event-stream")
        content = await answer.aread()
        await answer.aclose()
        return Response(content, media_type="application/json")

    async def _wait_until_served(self, model: NamedModel) -> str:
        """Waits until the model runs. Returns the URL of Serve's proxy. Raises Unavailable if it is late or fails."""
        deadline = time.monotonic() + self._settings.model_wait_seconds
        while time.monotonic() < deadline:
            try:
                view = await self._ray_api.look()
            except httpx.HTTPError:
                raise self._unavailable(model, "cannot be reached: the Ray cluster does not answer") from None
            app = view.applications.get(model.app_name)
            await self._touch(model, again=app is None)
            if app and app.state == "running" and view.base_url:
                return view.base_url
            if app and app.state == "failed":
                async with self._store.begin() as session:
                    await deployments.forget(session, model.app_name)  # so that the next request loads it again
                raise self._unavailable(model, f"could not be loaded: {app.message}")
            await asyncio.sleep(0.5)
        raise self._unavailable(model, f"is still loading after {self._settings.model_wait_seconds:.0f} seconds")

    async def _touch(self, model: NamedModel, *, again: bool) -> None:
        """Notes the use of the model. With `again` it does so now, because the model may have been evicted."""
        if again or time.monotonic() - self._touched.get(model.app_name, -TOUCH_SECONDS) >= TOUCH_SECONDS:
            async with self._store.begin() as session:
                await deployments.use(session, model)
            self._touched[model.app_name] = time.monotonic()

    def _unavailable(self, model: NamedModel, trouble: str) -> Unavailable:
        self._touched.pop(model.app_name, None)
        return Unavailable(
            f"The model '{model.id}' {trouble}. Try again in {RETRY_AFTER_SECONDS} seconds.",
            retry_after=RETRY_AFTER_SECONDS,
            code="model_unavailable",
        )

    def _refusal(self, model: NamedModel, answer: httpx.Response) -> ApiError:
        """Returns the server's error in OpenAI's envelope."""
        try:
            said = answer.json()
        except json.JSONDecodeError:
            said = {}
        error = said.get("error") if isinstance(said.get("error"), dict) else said
        message = str(error.get("message") or answer.text[:500] or "no reason given")
        param = error.get("param") if isinstance(error.get("param"), str) else None
        if refusal := REFUSALS.get(answer.status_code):
            return refusal(message, param=param, code="invalid_value")
        if answer.status_code in (429, 503):
            return self._unavailable(model, f"is overloaded: {message}")
        return ApiError(f"The model '{model.id}' failed: {message}", code="model_error")


async def _chunks(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Yields the server's events as they come. A stream that breaks ends with an error, which clients raise."""
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    except httpx.TransportError:
        error = ApiError("The model stopped answering in the middle of the stream.", code="model_error")
        yield f"data: {json.dumps(error.body())}\n\n".encode()
    finally:
        await answer.aclose()

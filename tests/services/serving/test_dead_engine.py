"""Tests what clients get from a replica whose engine has died, with an application in the place of vLLM's."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from services.serving.dead_engine import RetryLater


async def answer(request: Request) -> JSONResponse:
    return JSONResponse({"from": "vLLM"}, int(request.path_params["status"]))


async def stream(request: Request) -> StreamingResponse:
    return StreamingResponse(iter(["data: a\n\n", "data: error\n\n"]), media_type="text/event-stream")


def get(path: str, *, errored: bool) -> httpx.Response:
    app = RetryLater(
        Starlette(routes=[Route("/stream", stream), Route("/{status}", answer)]),
        engine=SimpleNamespace(errored=errored),
    )

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica") as client:
            return await client.get(path)

    return asyncio.run(ask())


@pytest.mark.parametrize("status", [500, 502])
def test_an_error_of_a_dead_engine_becomes_a_503_that_clients_retry(status: int) -> None:
    got = get(f"/{status}", errored=True)
    error: dict[str, Any] = got.json()["error"]
    assert (got.status_code, got.headers["retry-after"], error["type"]) == (503, "5", "engine_died")
    assert "send the request again" in error["message"]


@pytest.mark.parametrize(("path", "errored"), [("/500", False), ("/400", True), ("/200", True)])
def test_other_answers_pass_unchanged(path: str, errored: bool) -> None:
    got = get(path, errored=errored)
    assert (got.status_code, got.json()) == (int(path[1:]), {"from": "vLLM"})


def test_a_stream_that_has_begun_passes_unchanged() -> None:
    assert (get("/stream", errored=True)).text == "data: a\n\ndata: error\n\n"

"""Tests the routes of OpenAI's API that the service does not offer."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.http import unsupported

app = FastAPI()
app.include_router(unsupported.router, prefix="/v1")


async def send(method: str, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test/v1") as client:
        return await client.request(method, path)


@pytest.mark.parametrize(
    ("method", "path", "param", "reason"),
    [
        ("GET", "/chat/completions", "chat/completions", "does not store chat completions"),
        ("DELETE", "/chat/completions/chatcmpl-1", "chat/completions", "does not store chat completions"),
        ("POST", "/fine_tuning/alpha/graders/run", "fine_tuning/alpha", "has no graders"),
    ],
)
def test_a_route_that_is_not_offered_says_why(method: str, path: str, param: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        asyncio.run(send(method, path))
    assert raised.value.message == f"{method} /v1{path} is not supported: the service {reason}."
    assert (raised.value.param, raised.value.code) == (param, "unsupported_value")


def test_other_routes_and_methods_are_not_taken_away() -> None:
    assert asyncio.run(send("GET", "/fine_tuning/jobs")).status_code == 404
    assert asyncio.run(send("PUT", "/chat/completions")).status_code == 405

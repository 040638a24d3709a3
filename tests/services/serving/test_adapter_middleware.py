"""Tests what clients get from the middleware that attaches adapters, with applications in the place of vLLM's."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from services.contract import ADAPTER_HEADER, ADAPTER_SOURCE_HEADER, Adapter

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # in vLLM's own imports
HEADERS = [(ADAPTER_HEADER.encode(), b"ft%3A%C3%A9"), (ADAPTER_SOURCE_HEADER.encode(), b"s3%3A//b/a")]
Part = dict[str, Any]
App = Callable[[Callable[[Part], Awaitable[None]]], Awaitable[None]]


class Engine:
    """Attaches every adapter, or refuses it with `refusal`."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal, self.attachment = refusal, SimpleNamespace(is_deleted=False)
        self.attached: list[Adapter] = []

    @asynccontextmanager
    async def using(self, adapter: Adapter) -> AsyncIterator[tuple[Any, str]]:
        if self.refusal:
            raise self.refusal
        self.attached.append(adapter)
        yield self.attachment, "the adapter for vLLM"


def start(kind: str) -> Part:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}


def part(text: str, *, more: bool = True) -> Part:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def answer_of(engine: Engine, app: App, headers: Any = HEADERS) -> list[Part]:
    """Returns the messages of the response that `app` gives through the middleware."""
    from services.serving.adapter_middleware import AttachAdapter

    sent: list[Part] = []

    async def send(message: Part) -> None:
        sent.append(message)

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        await app(send)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(AttachAdapter(asgi, adapters=engine)(scope, None, send))  # type: ignore[arg-type]
    return sent


def error_in(message: Part) -> Any:
    return json.loads(message["body"].decode().strip().removeprefix("data: "))["error"]


@pytest.mark.slow
def test_the_adapter_of_the_headers_is_attached_while_the_app_answers() -> None:
    from services.serving.adapter_middleware import of_request

    async def app(send: Any) -> None:
        await send(start("application/json"))
        await send(part(str(of_request.get()), more=False))

    engine = Engine()
    assert answer_of(engine, app)[1]["body"] == b"the adapter for vLLM"
    assert engine.attached == [Adapter(id="ft:é", source="s3://b/a")]
    assert answer_of(engine, app, HEADERS[:1])[1]["body"] == b"None"  # without both headers: the base model
    assert len(engine.attached) == 1


@pytest.mark.slow
def test_a_refused_adapter_is_an_error_with_its_status_and_code() -> None:
    from services.serving.adapters import AdapterDeleted, AdapterRefused, AdapterUnusable

    async def app(send: Any) -> None:
        raise AssertionError("the app must not be called")

    for refusal, status, code in (
        (AdapterRefused("later"), 503, "model_unavailable"),
        (AdapterDeleted("ft:é"), 404, "model_not_found"),
        (AdapterUnusable("never"), 409, "adapter_unusable"),
    ):
        begun, body = answer_of(Engine(refusal), app)
        assert begun["status"] == status
        assert (error_in(body)["code"], error_in(body)["message"]) == (code, str(refusal))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nothing", "text/event-stream; charset=utf-8", "application/json"])
def test_a_deletion_ends_a_stream_with_an_error_and_lets_a_begun_answer_be_whole(kind: str) -> None:
    engine = Engine()

    async def app(send: Any) -> None:
        if kind == "nothing":
            engine.attachment.is_deleted = True
            raise RuntimeError("vLLM aborted the request")
        await send(start(kind))
        await send(part("one"))
        engine.attachment.is_deleted = True
        await send(part("two"))
        await send(part("three", more=False))

    begun, *bodies = answer_of(engine, app)
    if kind == "application/json":
        assert [each["body"] for each in bodies] == [b"one", b"two", b"three"]
        return
    assert begun["status"] == (404 if kind == "nothing" else 200)
    assert [each["body"] for each in bodies[:-1]] == ([] if kind == "nothing" else [b"one"])
    assert error_in(bodies[-1])["code"] == "model_not_found"
    assert not bodies[-1].get("more_body")


@pytest.mark.slow
def test_an_error_of_the_app_is_raised_while_the_adapter_is_there() -> None:
    async def app(send: Any) -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        answer_of(Engine(), app)

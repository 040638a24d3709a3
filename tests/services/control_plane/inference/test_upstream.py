"""Tests the HTTP client for engines against servers that are slow, break off, or do not speak HTTP."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from services.control_plane.core.errors import NotFound
from services.control_plane.inference import upstream
from services.control_plane.inference.upstream import Answer, Broken, Busy, Upstream

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def asked(serve: Serve, use: Callable[[Upstream, str], Awaitable[Any]], **options: Any) -> Any:
    """Runs a server that answers with `serve`, and returns what `use` returns."""

    async def run() -> Any:
        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await serve(reader, writer)
            writer.close()

        async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            given = {"connections": 2, "silence_seconds": 5.0, "wait_seconds": 0.1} | options
            return await use(Upstream(**given), f"http://127.0.0.1:{port}/app/v1/completions")

    return asyncio.run(asyncio.wait_for(run(), 300))


async def post(client: Upstream, url: str, model_id: str = "ft:a") -> Answer:
    return await client.post(url, b"{}", {"x-adapter": "ft%3Aa"}, model_id=model_id)


def test_the_request_is_whole_and_pieces_come_as_they_arrive() -> None:
    read = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        read.extend(await reader.readexactly(2))
        writer.write(HEAD + chunk(b"one"))
        await asyncio.sleep(0.05)
        writer.write(chunk(b"two") + chunk(b"three") + b"0\r\n\r\n")  # together, so they go on together

    async def use(client: Upstream, url: str) -> list[bytes]:
        answer = await post(client, url)
        assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
        pieces = []
        while piece := await answer.piece():
            pieces.append(piece)
        answer.close()
        return pieces

    assert asked(serve, use) == [b"one", b"twothree"]
    assert read == b"{}"


@pytest.mark.parametrize(
    ("said", "trouble"),
    [
        (b"", "the connection ended"),
        (b"220 mail.example ESMTP\r\n", "not valid HTTP"),
        (HEAD + chunk(b"one"), "the connection ended"),
        (HEAD + b"zz\r\n", "not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", "the connection ended"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-encoding: gzip\r\n\r\nab", "is encoded as gzip"),
    ],
)
def test_an_answer_that_breaks_off_or_is_none_is_broken(said: bytes, trouble: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)

    async def use(client: Upstream, url: str) -> None:
        answer = await post(client, url)
        await answer.body()

    with pytest.raises(Broken, match=trouble):
        asked(serve, use)


def test_silence_and_a_server_that_is_not_there_are_broken() -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(2)
        await reader.read()  # until the client has left

    with pytest.raises(Broken, match=r"silent for 0\.1 seconds"):
        asked(hold, post, silence_seconds=0.1)
    with pytest.raises(Broken, match="cannot be reached"):
        asked(hold, lambda client, _: post(client, "http://127.0.0.1:9/"))


def test_connections_are_limited_and_come_back_when_an_answer_is_closed() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        await reader.readexactly(2)
        await reader.read()  # until the client has left

    async def use(client: Upstream, url: str) -> None:
        first, second = await post(client, url), await post(client, url)
        with pytest.raises(Busy):
            await post(client, url)
        first.close()
        first.close()  # once is enough
        third = await post(client, url)
        with pytest.raises(Busy):
            await post(client, url)
        for answer in (second, third):
            answer.close()

    asked(serve, use)


def test_the_answers_of_one_model_end_with_an_error_and_others_go_on() -> None:
    has_left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(2)
        writer.write(HEAD + chunk(b"one"))
        await reader.read()  # until the client has left
        has_left.set()

    async def use(client: Upstream, url: str) -> None:
        gone, stays = await post(client, url, "gone"), await post(client, url, "stays")
        assert client.model_ids == {"gone", "stays"}
        assert await gone.piece() == b"one"
        gone.data_received(chunk(b"two"))  # it has arrived, and nobody has read it
        client.end("gone", NotFound("deleted"))
        with pytest.raises(NotFound, match="deleted"):
            await gone.piece()
        await has_left.wait()
        gone.close()
        assert await stays.piece() == b"one"
        assert client.model_ids == {"stays"}
        stays.close()
        assert client.model_ids == set()

    asked(serve, use)


def test_an_answer_that_has_not_begun_ends_as_well() -> None:
    has_come = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(2)
        has_come.set()
        await reader.read()  # until the client has left

    async def use(client: Upstream, url: str) -> None:
        waiting = asyncio.create_task(post(client, url))
        await has_come.wait()
        client.end("ft:a", NotFound("deleted"))
        with pytest.raises(NotFound, match="deleted"):
            await waiting
        assert client.model_ids == set()

    asked(hold, use)


def test_a_client_that_does_not_read_makes_the_server_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "MOST_WAITING", 2**16)
    written = [0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for _ in range(400):
            writer.write(chunk(b"x" * 2**16))
            await writer.drain()
            written[0] += 2**16
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def use(client: Upstream, url: str) -> int:
        answer = await post(client, url)
        await asyncio.sleep(0.5)
        assert written[0] < 400 * 2**16  # what sockets hold, and a little more
        size = len(await answer.body())
        answer.close()
        return size

    assert asked(serve, use) == 400 * 2**16

"""Tests that work ends when the client leaves, and how a model's streamed answer is passed on."""

import asyncio
import json
from typing import Any

import pytest

from services.control_plane.core.errors import NotFound
from services.control_plane.inference.metering import Meter
from services.control_plane.inference.streaming import Stream, while_connected
from services.control_plane.inference.upstream import Broken


class Pieces:
    """A model's answer that arrives in these pieces. An error is raised in place of a piece."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = list(pieces)

    async def piece(self) -> bytes:
        piece = self._pieces.pop(0) if self._pieces else b""
        if isinstance(piece, Exception):
            raise piece
        return piece


async def connected() -> Any:
    await asyncio.sleep(60)


async def left() -> Any:
    return {"type": "http.disconnect"}


def passed_on(
    *pieces: bytes | Exception, receive: Any = connected, shows_usage: bool = True
) -> tuple[list[bytes], int]:
    """Returns the bodies that a client gets, and how often the end was told."""
    sent, ends = list[dict[str, Any]](), list[int]()

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        meter = Meter(lambda *used: None, shows_usage=shows_usage)
        await Stream(Pieces(*pieces), meter, lambda: ends.append(1))({"type": "http"}, receive, send)  # type: ignore[arg-type]

    asyncio.run(run())
    return [message["body"] for message in sent if message["type"] == "http.response.body"], len(ends)


def test_lines_are_passed_on_whole_as_they_arrive() -> None:
    bodies, ends = passed_on(b"data: a\n\nda", b"ta", b": b\n\n", b"data: [DONE]\n\n")
    assert bodies == [b"data: a\n\n", b"data: b\n\n", b"data: [DONE]\n\n", b""]
    assert ends == 1


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_the_count_is_left_out_wherever_the_stream_is_cut_into_pieces(end: bytes) -> None:
    text, done = b'data: {"choices":[{}]}' + end, b"data: [DONE]" + end
    stream = text + b'data: {"choices":[],"usage":{"prompt_tokens":1}}' + end + done
    for cut in range(1, len(stream)):
        bodies, _ = passed_on(stream[:cut], stream[cut:], shows_usage=False)
        assert b"".join(bodies) == text + done, cut


@pytest.mark.parametrize(
    ("trouble", "code"), [(Broken("cut"), "model_error"), (NotFound("gone", code="model_not_found"), "model_not_found")]
)
def test_a_model_that_stops_or_is_deleted_leaves_an_error_in_place_of_the_line_it_had_begun(
    trouble: Exception, code: str
) -> None:
    bodies, ends = passed_on(b"data: a\n\nda", trouble)
    assert bodies[0] == b"data: a\n\n"
    error = json.loads(bodies[1].strip().removeprefix(b"data: "))["error"]
    assert (error["code"], len(bodies), ends) == (code, 2, 1)


def test_the_end_is_told_even_where_the_client_left_before_the_first_line() -> None:
    assert passed_on(receive=left)[1] == 1


def test_work_is_cancelled_when_the_client_leaves_and_its_errors_reach_the_caller() -> None:
    async def story() -> None:
        cancelled = asyncio.Event()

        async def endless() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        async def wrong() -> None:
            raise ValueError("wrong")

        assert await while_connected(left, endless()) is None
        assert cancelled.is_set()
        with pytest.raises(ValueError, match="wrong"):
            await while_connected(connected, wrong())
        assert await while_connected(connected, asyncio.sleep(0, "done")) == "done"

    asyncio.run(story())

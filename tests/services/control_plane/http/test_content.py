"""Tests downloads of bytes and of ranges, with a plain file as the oracle."""

import asyncio
import base64
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from services.control_plane.core.errors import RangeNotSatisfiable
from services.control_plane.http import content
from services.control_plane.http.content import Content, answer, read_file

BYTES = bytes(range(256)) * 8200  # more than two chunks
DIGEST = f"sha-256=:{base64.b64encode(hashlib.sha256(BYTES).digest()).decode()}:"


@pytest.fixture
def reads() -> list[range]:
    return []


@pytest.fixture
def get(tmp_path: Path, reads: list[range], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that downloads a file with some headers. `reads` gets the ranges that were read."""
    (tmp_path / "file").write_bytes(BYTES)
    monkeypatch.setattr(content, "_digests", {})

    def read(span: range) -> Iterator[bytes]:
        reads.append(span)
        return read_file((tmp_path / "file").as_uri(), span)

    found = Content(len(BYTES), "tag", 'a "name"/\n.jsonl', "text/plain", read)
    app = FastAPI()

    @app.get("/")
    async def download(request: Request) -> Response:
        return await answer(request, found)

    async def send(headers: dict[str, str]) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/", headers=headers)

    return lambda **headers: asyncio.run(send({name.replace("_", "-"): value for name, value in headers.items()}))


def test_the_whole_is_the_file_with_a_name_that_no_header_can_be_broken_with(get: Any) -> None:
    whole = get()
    assert (whole.status_code, whole.content) == (200, BYTES)
    assert whole.headers["content-length"] == str(len(BYTES))
    assert whole.headers["etag"] == '"tag"'
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-disposition"] == 'attachment; filename="a__name___.jsonl"'
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert "repr-digest" not in whole.headers


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-", 5, len(BYTES)),
        ("bytes=1048570-1048580", 1048570, 1048581),
        ("bytes=-3", len(BYTES) - 3, len(BYTES)),
        (f"bytes=-{len(BYTES) + 9}", 0, len(BYTES)),
        (f"bytes=10-{10**17}", 10, len(BYTES)),
    ],
)
def test_a_range_is_the_slice(get: Any, asked: str, start: int, stop: int) -> None:
    part = get(range=asked)
    assert (part.status_code, part.content) == (206, BYTES[start:stop])
    assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(BYTES)}"
    assert part.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize("asked", ["bytes=-", "bytes=0-1,4-5", "lines=0-1", "bytes=a-b"])
def test_other_headers_are_ignored(get: Any, asked: str) -> None:
    assert (get(range=asked).status_code, get(range=asked).content) == (200, BYTES)


@pytest.mark.parametrize("asked", [f"bytes={len(BYTES)}-", "bytes=9-3", "bytes=-0"])
def test_a_range_without_bytes_is_refused_with_the_size(get: Any, asked: str) -> None:
    with pytest.raises(RangeNotSatisfiable) as raised:
        get(range=asked)
    assert raised.value.headers == {"content-range": f"bytes */{len(BYTES)}"}


def test_a_part_of_another_version_is_answered_with_the_whole(get: Any) -> None:
    assert get(range="bytes=0-4", if_range='"tag"').content == BYTES[:5]
    changed = get(range="bytes=0-4", if_range='"older"')
    assert (changed.status_code, changed.content) == (200, BYTES)


def test_the_digest_is_of_the_whole_even_for_a_range_and_read_once(get: Any, reads: list[range]) -> None:
    for _ in range(2):
        part = get(range="bytes=0-4", want_repr_digest="sha-256=1")
        assert (part.content, part.headers["repr-digest"]) == (BYTES[:5], DIGEST)
    assert reads == [range(len(BYTES)), range(5), range(5)]


def test_the_digest_of_a_finished_download_needs_no_further_reading(get: Any, reads: list[range]) -> None:
    get()
    assert get(range="bytes=0-0", want_repr_digest="sha-256=1").headers["repr-digest"] == DIGEST
    assert reads == [range(len(BYTES)), range(1)]


def test_a_file_that_became_shorter_is_an_error_and_not_a_short_answer(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"1234")
    read = partial(read_file, (tmp_path / "short").as_uri())
    assert b"".join(read(range(1, 4))) == b"234"
    with pytest.raises(OSError, match="ends 2 bytes too early"):
        list(read(range(1, 6)))

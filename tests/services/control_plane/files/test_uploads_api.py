"""Tests the routes of uploads."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY
from tests.services.control_plane.files.test_uploads import DATA, MD5, begin, parts_of, send
from tests.services.control_plane.http.test_idempotency import DroppingProxy


def test_parts_come_at_once_and_their_order_is_told_at_the_end(client: openai.OpenAI) -> None:
    upload_id = begin(client)
    chunks = [DATA[start : start + 999] for start in range(0, len(DATA), 999)]
    with ThreadPoolExecutor(8) as pool:
        sent = dict(pool.map(lambda i: (i, send(client, upload_id, chunks[i])), reversed(range(len(chunks)))))
    done = client.uploads.complete(upload_id, part_ids=[sent[i] for i in range(len(chunks))], md5=MD5.upper())
    assert done.file is not None
    assert client.files.content(done.file.id).read() == DATA


def test_limits_are_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="8589934593, but a file may have at most 8589934592") as refused:
        client.uploads.create(filename="a", purpose="fine-tune", bytes=2**33 + 1, mime_type="text/plain")
    assert refused.value.param == "bytes"
    with pytest.raises(openai.BadRequestError, match="purpose 'batch'"):
        client.uploads.create(filename="a", purpose="batch", bytes=1, mime_type="text/plain")
    with pytest.raises(openai.BadRequestError) as refused:
        begin(client, expires_after={"anchor": "created_at", "seconds": 60})
    assert refused.value.param == "expires_after.seconds"
    for name, value in (("filename", "a\0b"), ("filename", "a" * 256), ("mime_type", "a\0b"), ("bytes", 0)):
        body: Any = {"filename": "a", "purpose": "fine-tune", "bytes": 1, "mime_type": "text/plain", name: value}
        with pytest.raises(openai.BadRequestError) as refused:
            client.uploads.create(**body)
        assert refused.value.param == name
    upload_id = begin(client, b"ab")
    send(client, upload_id, b"abc")
    with pytest.raises(openai.BadRequestError, match=r"have 6 bytes, more than twice its size of 2"):
        send(client, upload_id, b"abc")
    with pytest.raises(openai.APIStatusError, match="the limit is") as too_large:
        send(client, upload_id, bytes(66 * 2**20))
    assert too_large.value.status_code == 413
    with pytest.raises(openai.NotFoundError):
        send(client, "upload_none", b"")


@pytest.fixture
def resending(base_url: str) -> Iterator[tuple[openai.OpenAI, DroppingProxy]]:
    proxy = DroppingProxy(base_url)
    http = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))
    with openai.OpenAI(base_url=f"http://127.0.0.1:{proxy.port}/v1", api_key=API_KEY, http_client=http) as client:
        yield client, proxy
    proxy.close()


@pytest.mark.slow
def test_lost_answers_make_one_upload_its_parts_and_one_file(
    client: openai.OpenAI, resending: tuple[openai.OpenAI, DroppingProxy], settings: Settings
) -> None:
    again, proxy = resending
    files = [file.id for file in client.files.list()]
    proxy.drops = 1
    upload_id = begin(again)
    sent = []
    for start in (0, 1000):
        proxy.drops = 1
        sent.append(send(again, upload_id, DATA[start:1000] if start == 0 else DATA[start:]))
    assert len(parts_of(settings, upload_id)) == 2
    proxy.drops = 2
    done = again.uploads.complete(upload_id, part_ids=sent)
    assert done.file is not None
    assert [file.id for file in client.files.list()] == [done.file.id, *files]

"""What comes in is bounded, and whoever is refused can read why."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import openai
import pytest

from services.control_plane.errors import Unavailable
from services.control_plane.limits import Budget, Limits
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, pairs

MIB = 2**20
KEY = {"Authorization": f"Bearer {API_KEY}"}


@pytest.fixture(scope="module")
def settings(offline: Settings) -> Settings:
    small = {"max_upload_bytes": 4 * MIB, "max_json_bytes": MIB, "stall_seconds": 2, "max_requests": 8}
    small["max_spool_bytes"] = 4 * MIB
    return offline.model_copy(update=small)


def refusal(answer: httpx.Response) -> Any:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return error["message"]


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [4 * MIB + 1, 40 * MIB])
def test_the_client_reads_the_refusal_of_a_file_that_is_too_large(client: openai.OpenAI, num_bytes: int) -> None:
    with pytest.raises(openai.APIStatusError, match=r"limit is \d+.*upload_file_chunked") as refused:
        client.files.create(file=("large.jsonl", b" " * num_bytes), purpose="fine-tune")
    assert refused.value.status_code == 413
    assert client.files.list().data == []  # on the same connection


def test_a_body_of_json_is_bounded_too(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="limit is 1048576") as refused:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a" * 20 * MIB}])
    assert refused.value.status_code == 413


def test_bytes_count_where_no_length_is_told(base_url: str) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * MIB

    for path, kind in (("files", "multipart/form-data; boundary=b"), ("fine_tuning/jobs", "application/json")):
        answer = httpx.post(f"{base_url}/v1/{path}", content=body(), headers={**KEY, "content-type": kind})
        assert answer.status_code in (400, 413)
        refusal(answer)
    assert answer.status_code == 413


def test_who_has_no_key_is_told_before_a_file_is_read(base_url: str) -> None:
    url = httpx.URL(base_url)
    with socket.create_connection((url.host, url.port or 80)) as client:
        lines = ["POST /v1/files HTTP/1.1", "host: a", "content-length: 1000000"]
        lines += ["content-type: multipart/form-data; boundary=b", "", ""]
        client.sendall("\r\n".join(lines).encode())
        assert client.recv(100).startswith(b"HTTP/1.1 401")


# --- time --------------------------------------------------------------------------------------


def slow(base_url: str, *pieces: bytes, pause: float) -> bytes:
    host, port = httpx.URL(base_url).host, httpx.URL(base_url).port
    with socket.create_connection((host, port or 80), timeout=60) as client:
        answer = b""
        with suppress(ConnectionError):  # whoever goes on sending may be cut off
            for piece in pieces:
                client.sendall(piece)
                time.sleep(pause)
        with suppress(ConnectionError):
            while data := client.recv(1 << 16):
                answer += data
        return answer


def head(path: str, length: int) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: a", f"authorization: Bearer {API_KEY}", f"content-length: {length}"]
    return "\r\n".join([*lines, "content-type: application/json", "", ""]).encode()


@pytest.mark.slow
def test_a_body_that_stalls_is_ended_with_an_envelope(base_url: str) -> None:
    answer = slow(base_url, head("/v1/fine_tuning/jobs", 100), b"{", pause=0)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"stalled after 1 bytes" in answer


@pytest.mark.slow
def test_a_body_that_drips_is_ended_as_well(base_url: str) -> None:
    began = time.monotonic()
    answer = slow(base_url, head("/v1/fine_tuning/jobs", 100), *[b" "] * 6, pause=0.5)
    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 30


# --- heads, parts and names --------------------------------------------------------------------


def form(*parts: bytes) -> dict[str, Any]:
    body = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + b"--b--\r\n"
    return {"content": body, "headers": {**KEY, "content-type": "multipart/form-data; boundary=b"}}


PURPOSE = b'Content-Disposition: form-data; name="purpose"\r\n\r\nfine-tune'


def file_part(name: bytes, data: bytes = b"{}", more: bytes = b"") -> bytes:
    return b'Content-Disposition: form-data; name="file"; filename="' + name + b'"\r\n' + more + b"\r\n" + data


HOSTILE = {
    "10^4 fields": [PURPOSE] * 10**4,
    "10^4 files": [PURPOSE, *[file_part(b"a")] * 10**4],
    "10^5 headers in a part": [PURPOSE, file_part(b"a", more=b"a: b\r\n" * 10**5)],
    "a field of 1 MiB": [b'Content-Disposition: form-data; name="purpose"\r\n\r\n' + b"a" * MIB],
    "a name of 4 KB": [PURPOSE, file_part(b"a" * 4000)],
    "NUL in a name": [PURPOSE, file_part(b"a\0b")],
    "a line feed in a name": [PURPOSE, file_part(b"a%0Ab".replace(b"%0A", b"\x0b"))],
    "a name of dots": [PURPOSE, file_part(b"../..")],
    "no name": [PURPOSE, b'Content-Disposition: form-data; name="file"\r\n\r\n{}'],
    "no disposition": [b"a: b\r\n\r\nx"],
    "an unknown field": [PURPOSE, b'Content-Disposition: form-data; name="purposes"\r\n\r\na', file_part(b"a")],
    "a field twice": [PURPOSE, PURPOSE, file_part(b"a")],
    "no form": [],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_are_refused_in_words(base_url: str, name: str) -> None:
    began = time.process_time()  # the service is in this process
    answer = httpx.post(f"{base_url}/v1/files", **form(*HOSTILE[name]), timeout=300)
    assert answer.status_code == 400
    assert len(refusal(answer)) < 500
    assert time.process_time() - began < 5


def test_of_a_path_the_last_part_is_the_name(base_url: str) -> None:
    answer = httpx.post(f"{base_url}/v1/files", **form(PURPOSE, file_part(b"../../etc/a.jsonl", pairs())))
    assert answer.json()["filename"] == "a.jsonl"


def test_a_head_that_does_not_end_is_refused(base_url: str) -> None:
    answer = slow(base_url, b"GET /v1/files HTTP/1.1\r\n", b"a: b\r\n" * 11_000, pause=0)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"type": "invalid_request_error"' in answer
    slow(base_url, b"GET /v1/files HTTP/1.1\r\n", *[b"a: b\r\n" * 10**5] * 20, pause=0)
    slow(base_url, b"GET /v1/files HTTP/1.1\r\na: ", *[b"b" * 10**6] * 20, pause=0)
    assert httpx.get(f"{base_url}/v1/files", headers=KEY).status_code == 200


@pytest.mark.parametrize("path", ["/v1/files/%00", "/v1/files?after=%00"])
def test_a_nul_in_a_url_is_refused(base_url: str, path: str) -> None:
    answer = httpx.get(base_url + path, headers=KEY)
    assert answer.status_code == 400
    assert "NUL" in refusal(answer)


# --- how many ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_requests_than_can_be_answered_are_sent_away_and_come_again(
    base_url: str, client: openai.OpenAI, settings: Settings
) -> None:
    url = httpx.URL(base_url)
    with ExitStack() as senders:
        for _ in range(settings.max_requests):
            sender = senders.enter_context(socket.create_connection((url.host, url.port or 80)))
            sender.sendall(head("/v1/fine_tuning/jobs", 100))
        time.sleep(0.5)
        answer = httpx.get(f"{base_url}/v1/files", headers=KEY)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "8 requests are being answered" in refusal(answer)
        assert httpx.get(f"{base_url}/healthz").status_code == 200
        assert client.with_options(max_retries=5).files.list().object == "list"


async def _event_stream(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})
    await receive()


async def _open_stream(limits: Limits) -> list[int]:
    counted: list[int] = []

    async def receive() -> Any:
        counted.append(limits.answering)
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        counted.append(limits.answering)

    await limits({"type": "http", "path": "/", "query_string": b"", "headers": []}, receive, send)
    return [*counted, limits.answering]


def test_an_open_event_stream_is_not_counted(settings: Settings) -> None:
    assert asyncio.run(_open_stream(Limits(_event_stream, settings))) == [0, 0, 0]


def test_uploads_share_a_bounded_spool(base_url: str, client: openai.OpenAI) -> None:
    url = httpx.URL(base_url)
    with socket.create_connection((url.host, url.port or 80)) as sender:
        kind = b"multipart/form-data; boundary=b"
        sender.sendall(head("/v1/files", 3 * MIB).replace(b"application/json", kind))
        time.sleep(0.5)
        with pytest.raises(openai.InternalServerError, match=r"hold \d+ of 4194304 bytes of disk") as refused:
            client.files.create(file=("a.jsonl", b" " * 2 * MIB), purpose="fine-tune")
        assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (503, "2")
    file = client.with_options(max_retries=5).files.create(file=("a.jsonl", pairs() * 500), purpose="fine-tune")
    assert file.bytes > MIB


def test_what_is_alone_is_not_refused() -> None:
    budget = Budget(100, "disk")
    budget.take(200)
    with pytest.raises(Unavailable, match="200 of 100 bytes of disk"):
        budget.take(1)

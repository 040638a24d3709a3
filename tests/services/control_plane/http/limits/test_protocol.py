"""Tests the limits on a request's headers, and on clients that do not read."""

import re
import socket
import time
from contextlib import ExitStack, suppress

import httpx
import openai
import psycopg
import pytest

from services import storage
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pairs, wait_for
from tests.services.control_plane.http.limits.test_limits import KEY, MIB, head, slow


@pytest.fixture(scope="module")
def settings(offline: Settings) -> Settings:
    return offline.model_copy(update={"stall_seconds": 2, "max_requests": 8})


def test_a_head_that_does_not_end_is_refused(base_url: str) -> None:
    answer = slow(base_url, b"GET /v1/files HTTP/1.1\r\n", b"a: b\r\n" * 11_000, pause=0)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"type": "invalid_request_error"' in answer
    slow(base_url, b"GET /v1/files HTTP/1.1\r\n", *[b"a: b\r\n" * 10**5] * 20, pause=0)
    slow(base_url, b"GET /v1/files HTTP/1.1\r\na: ", *[b"b" * 10**6] * 20, pause=0)
    assert httpx.get(f"{base_url}/v1/files", headers=KEY, timeout=60).status_code == 200


def test_a_head_that_comes_whole_is_measured_as_well(base_url: str) -> None:
    for num_bytes, status in ((60_000, b"200"), (70_000, b"400"), (200_000, b"400")):
        fields = f"authorization: {KEY['Authorization']}\r\nconnection: close\r\na: {'b' * num_bytes}\r\n\r\n"
        answer = slow(base_url, f"GET /v1/files HTTP/1.1\r\n{fields}".encode(), pause=0)
        assert answer.startswith(b"HTTP/1.1 " + status)


def test_the_head_of_a_later_request_is_measured_and_what_came_before_it_is_not(base_url: str) -> None:
    begin = f"GET /v1/files HTTP/1.1\r\nhost: a\r\nauthorization: {KEY['Authorization']}\r\n".encode()
    first, long = begin + b"\r\n", begin + b"a: " + b"b" * 70_000 + b"\r\n\r\n"
    url = httpx.URL(base_url)
    with socket.create_connection((url.host, url.port or 80), timeout=300) as connection:
        connection.sendall(first)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        with suppress(ConnectionError):
            connection.sendall(long)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400")
    body, last = b"{" + b" " * 100_000, begin + b"connection: close\r\n\r\n"
    with_body = slow(base_url, head("/v1/fine_tuning/jobs", len(body)) + body + last, pause=0)
    many = slow(base_url, (begin + b"a: " + b"b" * 1000 + b"\r\n\r\n") * 70 + last, pause=0)
    assert re.findall(rb"HTTP/1\.1 (\d+)", with_body) == [b"400", b"200"], "the body is no JSON, and no head"
    assert re.findall(rb"HTTP/1\.1 (\d+)", many) == [b"200"] * 71


@pytest.mark.slow
def test_who_does_not_read_an_answer_is_cut_off(base_url: str, client: openai.OpenAI, settings: Settings) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    num_bytes = 16 * MIB  # more than sockets hold
    storage.write_bytes(storage.join(settings.storage_url, "files", file.id), bytes(num_bytes))
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("UPDATE files SET num_bytes = %s WHERE id = %s", [num_bytes, file.id])
    url, request = httpx.URL(base_url), head(f"/v1/files/{file.id}/content", 0).replace(b"POST", b"GET")
    with ExitStack() as readers:
        sockets = [readers.enter_context(socket.socket()) for _ in range(settings.max_requests // 2)]
        for reader in sockets:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((url.host, url.port or 80))
            reader.sendall(request)
        wait_for(lambda: httpx.get(f"{base_url}/v1/files", headers=KEY).status_code == 503)
        wait_for(lambda: httpx.get(f"{base_url}/v1/files", headers=KEY).status_code == 200)
        received = 0
        with suppress(ConnectionResetError):
            while data := sockets[0].recv(2**16):
                received += len(data)
        assert received < num_bytes
    assert len(client.files.content(file.id).read()) == num_bytes
    client.files.delete(file.id)


@pytest.mark.long
@pytest.mark.slow
def test_who_reads_slowly_gets_all(base_url: str, client: openai.OpenAI, settings: Settings) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs(2_000)), purpose="fine-tune")
    url, request = httpx.URL(base_url), head(f"/v1/files/{file.id}/content", 0).replace(b"POST", b"GET")
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((url.host, url.port or 80))
        reader.sendall(request.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        received, began = b"", time.monotonic()
        while data := reader.recv(2**16):
            received += data
            time.sleep(0.02)
        assert received.endswith(pairs(2_000))
        assert time.monotonic() - began > settings.stall_seconds

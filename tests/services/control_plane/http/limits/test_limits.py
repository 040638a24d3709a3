"""Tests the limits on requests, and that every client that is refused gets a readable answer."""

import asyncio
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.control_plane.core.errors import Unavailable
from services.control_plane.http.limits.limits import Limits, Room
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, api_of, new_key, new_project, pairs

T = TypeVar("T")
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
    assert b"after 1 bytes" in answer


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


@pytest.mark.parametrize("path", ["/v1/files/%00", "/v1/files?after=%00"])
def test_a_nul_in_a_url_is_refused(base_url: str, path: str) -> None:
    answer = httpx.get(base_url + path, headers=KEY)
    assert answer.status_code == 400
    assert "NUL" in refusal(answer)


# --- how many ----------------------------------------------------------------------------------


@pytest.fixture
def other(api: httpx.Client, base_url: str) -> Iterator[httpx.Client]:
    """Returns an HTTP client with a key of another project than the default one."""
    project = new_project(api, secrets.token_hex(4))
    with api_of(base_url, new_key(api, project_id=project)["value"]) as other:
        yield other


def open_request(base_url: str, senders: ExitStack, head: bytes) -> None:
    """Opens a request whose body never arrives, and returns when the service waits for the body or has refused it."""
    url = httpx.URL(base_url)
    sender = senders.enter_context(socket.create_connection((url.host, url.port or 80), timeout=300))
    sender.sendall(head.replace(b"host: a", b"host: a\r\nexpect: 100-continue"))
    sender.recv(1)


def beside_open_requests(base_url: str, heads: Sequence[bytes], refused: Callable[[], T | None]) -> T:
    """Returns what `refused` returns while requests with these heads are open.

    The service ends a request whose body does not arrive. While `refused` returns None, each try opens new ones.
    """
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with ExitStack() as senders:
            for head in heads:
                open_request(base_url, senders, head)
            if (found := refused()) is not None:
                return found
    raise AssertionError("nothing was refused")


def jobs_head(key: str) -> bytes:
    return head("/v1/fine_tuning/jobs", 100).replace(API_KEY.encode(), key.encode())


@pytest.mark.slow
def test_one_project_takes_half_of_the_places_and_the_others_and_attempts_have_theirs(
    base_url: str, client: openai.OpenAI, other: httpx.Client, settings: Settings
) -> None:
    def full() -> httpx.Response | None:
        refused = httpx.get(f"{base_url}/v1/files", headers=KEY)
        assert other.get("/files").status_code == 200
        for path, status in (("/healthz", 200), ("/metrics", 200)):
            assert httpx.get(base_url + path).status_code == status
        report = httpx.post(f"{base_url}/internal/attempts/ftjob-1/1/events", json={"events": []}, headers=KEY)
        assert report.status_code == 409
        return refused if refused.status_code == 503 else None

    refused = beside_open_requests(base_url, [jobs_head(API_KEY)] * settings.max_requests, full)
    assert refused.headers["retry-after"] == "1"
    assert "Requests of this project use 4 of 8 requests at once" in refusal(refused)
    assert client.with_options(max_retries=5).files.list().object == "list"


@pytest.mark.slow
def test_unknown_keys_take_half_of_the_places_at_most(base_url: str, settings: Settings) -> None:
    def full() -> str | None:
        refused = httpx.get(f"{base_url}/v1/files")
        assert httpx.get(f"{base_url}/v1/files", headers=KEY).status_code == 200
        return refusal(refused) if refused.status_code == 503 else None

    heads = [jobs_head(f"rd-nobodys-{number}") for number in range(settings.max_requests)]
    assert "Requests of unknown keys use 4 of 8 requests at once" in beside_open_requests(base_url, heads, full)


async def _event_stream(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})
    await receive()


async def nobody(token: str) -> str | None:
    return token or None


def scope_of(path: str, token: str = "") -> dict[str, Any]:
    headers = [(b"authorization", f"Bearer {token}".encode())]
    return {"type": "http", "path": path, "query_string": b"", "headers": headers}


async def _open_stream(limits: Limits, path: str) -> list[tuple[int, int]]:
    counted: list[tuple[int, int]] = []

    def count() -> None:
        counted.append((limits.users.places.taken, limits.users.streams.taken))

    async def receive() -> Any:
        count()
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        count()

    await limits(scope_of(path), receive, send)
    count()
    return counted


def test_an_open_event_stream_is_counted_apart_and_one_of_a_completion_is_not(settings: Settings) -> None:
    limits = Limits(_event_stream, settings, nobody)
    assert asyncio.run(_open_stream(limits, "/")) == [(0, 1), (0, 1), (0, 0)]
    assert asyncio.run(_open_stream(limits, "/v1/chat/completions")) == [(1, 0), (1, 0), (0, 0)]


def test_a_project_whose_completions_wait_for_models_is_answered_otherwise(settings: Settings) -> None:
    async def work() -> None:
        done, statuses = asyncio.Event(), list[int]()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/v1/completions":
                await done.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        limits = Limits(app, settings, nobody)

        async def ask(path: str, token: str) -> None:
            await limits(scope_of(path, token), send, send)

        async with asyncio.TaskGroup() as asked:
            for _ in range(10):
                asked.create_task(ask("/v1/completions", "a"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert statuses == [503] * 6
            await ask("/v1/models", "a")
            assert statuses[6:] == [200]
            done.set()
        assert limits.users.places.taken == 0

    asyncio.run(work())


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=60))
def test_of_however_many_holders_the_next_one_finds_room(moves: list[tuple[str, bool]]) -> None:
    room, held = Room(8, "places"), Counter[str]()
    for holder, takes in moves:
        if takes:
            with suppress(Unavailable):
                room.take(1, holder)
                held[holder] += 1
        elif held[holder]:
            room.give_back(1, holder)
            held[holder] -= 1
        assert room.taken == held.total()
        if not held["f"] and sum(held[name] > 0 for name in "abcde") < 4:
            room.take(1, "f")
            room.give_back(1, "f")


def test_uploads_share_a_bounded_spool(base_url: str, client: openai.OpenAI) -> None:
    def full() -> openai.InternalServerError | None:
        try:
            client.files.create(file=("a.jsonl", b" " * 2 * MIB), purpose="fine-tune")
        except openai.BadRequestError:  # it had room: the open upload has been ended
            return None
        except openai.InternalServerError as error:
            return error
        raise AssertionError("a file without rows was accepted")

    upload = head("/v1/files", 3 * MIB).replace(b"application/json", b"multipart/form-data; boundary=b")
    refused = beside_open_requests(base_url, [upload], full)
    assert re.search(r"use \d+ of at most 4194304 bytes of disk", refused.message)
    assert (refused.status_code, refused.response.headers["retry-after"]) == (503, "1")
    file = client.with_options(max_retries=5).files.create(file=("a.jsonl", pairs() * 500), purpose="fine-tune")
    assert file.bytes > MIB


def test_what_is_alone_is_not_refused_and_of_several_one_holder_has_half() -> None:
    room = Room(100, "bytes of disk")
    room.take(200)
    with pytest.raises(Unavailable, match="200 of at most 100 bytes of disk"):
        room.take(1)
    room.give_back(200)
    room.take(30, "a")
    room.take(60, "a", has=30)  # the same request goes on
    with pytest.raises(
        Unavailable,
        match="Requests of this project use 90 of 100 bytes of disk, and the 10 left are kept for other projects",
    ):
        room.take(1, "a")
    room.take(10, "b")

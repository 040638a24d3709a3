"""Tests downloads from a web server on loopback that breaks off, changes the file and redirects."""

from collections.abc import Iterator

import httpx
import pytest

from services import outbound
from services.training.source import download as downloads
from services.training.source.download import download
from services.uri import InvalidUri
from tests.services.web import Web, running_web

DATA = bytes(range(256)) * 4096  # 1 MiB
URL = "/rows.jsonl"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(downloads, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    with running_web() as web:
        web.files[URL] = DATA
        yield web


def read(web: Web, path: str = URL) -> bytes:
    told: list[tuple[int, int]] = []
    with outbound.client([web.url]) as client:
        data = b"".join(download(client, web.url + path, lambda *counts: told.append(counts), lambda _: None))
    assert sum(size for size, _ in told) == len(data)
    assert {length for _, length in told} == {len(DATA)}
    return data


def asked(web: Web) -> list[str | None]:
    return [headers.get("range") for _, headers in web.requests]


def test_a_file_arrives_as_it_is(web: Web) -> None:
    assert read(web) == DATA
    assert web.requests[0][1]["accept-encoding"] == "identity"


def test_what_breaks_off_is_taken_up_where_it_broke(web: Web) -> None:
    web.cuts = [100_000, 0, 200_000]
    assert read(web) == DATA
    assert asked(web) == [None, "bytes=100000-", "bytes=100000-", "bytes=300000-"]
    assert {headers.get("if-range") for _, headers in web.requests[1:]} == {'"one"'}


@pytest.mark.parametrize("etag", [None, 'W/"weak"', '"one"'])
def test_a_server_that_cannot_resume_sends_all_again_and_nothing_is_doubled(web: Web, etag: str | None) -> None:
    web.etag, web.ranges, web.cuts = etag, False, [100_000, 50_000, 200_000]
    assert read(web) == DATA
    assert asked(web)[1] == ("bytes=100000-" if etag == '"one"' else None)


@pytest.mark.parametrize("changed", [DATA[::-1], DATA[:1000], b""])
def test_a_file_that_changes_meanwhile_is_not_joined_to_what_it_was(web: Web, changed: bytes) -> None:
    web.cuts = [100_000]
    with outbound.client([web.url]) as client:
        pieces = download(client, web.url + URL, lambda *_: None, lambda _: None)
        next(pieces)
        web.files[URL], web.etag = changed, '"two"'
        with pytest.raises(OSError, match="changed while it was being read"):
            list(pieces)


def test_passing_failures_are_tried_again_and_then_left_to_the_next_attempt(web: Web) -> None:
    web.statuses[URL] = [503, 429, 500]
    assert read(web) == DATA
    web.statuses[URL] = [503] * 9
    with pytest.raises(httpx.HTTPStatusError):
        read(web)
    assert len(web.statuses[URL]) == 5


def test_tries_that_bring_too_little_end(web: Web) -> None:
    web.cuts = [1000] * 99
    with pytest.raises(httpx.RemoteProtocolError):
        read(web)
    assert len(web.requests) == 4


@pytest.mark.parametrize("status", [401, 403, 404, 410, 204])
def test_what_the_server_will_not_give_is_the_users_to_mend(web: Web, status: int) -> None:
    web.statuses[URL] = [status]
    with pytest.raises(InvalidUri, match=f"rows.jsonl was answered with {status}"):
        read(web)
    assert len(web.requests) == 1


def test_a_slow_server_is_not_waited_for_longer_than_the_limit(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "READ_SECONDS", 0.1)
    monkeypatch.setattr(downloads, "PAUSES_SECONDS", ())
    web.pause_seconds = 1.0
    with pytest.raises(httpx.ReadTimeout):
        read(web)


@pytest.mark.parametrize("told", [True, False])
def test_a_file_above_the_limit_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    web.lengths = told
    monkeypatch.setattr(downloads, "MAX_BYTES", len(DATA) - 1)
    with pytest.raises(InvalidUri, match="is larger than"):
        read(web)


def test_redirects_are_followed_a_few_times(web: Web) -> None:
    steps = [f"/{step}" for step in range(7)]
    web.redirects = dict(zip(steps, [*steps[1:], URL], strict=True))
    assert read(web, "/2") == DATA
    with pytest.raises(InvalidUri, match="more than 5 times"):
        read(web, "/1")


def test_a_redirect_to_our_own_network_is_refused(web: Web) -> None:
    web.redirects[URL] = f"http://localhost:{web.port}{URL}"
    with outbound.client([web.url, "http://"]) as client, pytest.raises(InvalidUri, match="not public"):
        list(download(client, web.url + URL, lambda *_: None, lambda _: None))

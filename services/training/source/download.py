"""The bytes behind a URL, streamed. What the network breaks is taken up where it broke."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import httpx

from services.uri import InvalidUri

MAX_BYTES = 2**36  # of one file: 64 GiB
MAX_REDIRECTS = 5
PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)  # before the tries that follow a failure
PROGRESS_BYTES = 2**20  # that a try must bring, or it counts as another failure in a row
PASSING = (408, 425, 429)  # and all from 500: an answer that another try may change


class Remote(NamedTuple):
    """A file that is to be downloaded."""

    name: str  # for the user
    size: int  # bytes; 0 where it is not known yet
    url: str


def download(client: httpx.Client, url: str, arrived: Callable[[int, int], None]) -> Iterator[bytes]:
    """The file at `url`, as the server keeps it. `arrived(bytes, length of the file or 0)` is told of every piece.

    Raises InvalidUri for what the user can mend, httpx.HTTPError for what another attempt may.
    """
    digest, offset, length, tag = hashlib.sha256(), 0, 0, ""
    failures = before = 0
    while True:
        try:
            with _get(client, url, _headers(offset, tag)) as response:
                if not offset:
                    length, tag = int(response.headers.get("Content-Length", 0)), _strong(response.headers.get("ETag"))
                for data in _after(offset, digest, response):
                    offset += len(data)
                    if max(offset, length) > MAX_BYTES:
                        raise InvalidUri(
                            f"{url} holds more than {MAX_BYTES // 2**30} GiB; split it into several files."
                        )
                    digest.update(data)
                    arrived(len(data), length)
                    yield data
                return
        except httpx.HTTPError:
            failures = 0 if offset - before >= PROGRESS_BYTES else failures
            before = offset
            if failures == len(PAUSES_SECONDS):
                raise
            time.sleep(PAUSES_SECONDS[failures])
            failures += 1


def _headers(offset: int, tag: str) -> dict[str, str]:
    identity = {"Accept-Encoding": "identity"}
    return identity | ({"Range": f"bytes={offset}-", "If-Range": tag} if offset and tag else {})


def _strong(tag: str | None) -> str:
    return "" if tag is None or tag.startswith("W/") else tag


def _after(offset: int, digest: Any, response: httpx.Response) -> Iterator[bytes]:
    """What follows the first `offset` bytes. Where a server sends all again, their digest must be what it was."""
    if response.status_code == httpx.codes.PARTIAL_CONTENT:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise _changed(response)
        yield from response.iter_raw()
        return
    known, again, left = digest.digest(), hashlib.sha256(), offset
    for data in response.iter_raw():
        again.update(data[:left])
        data, left = data[left:], max(0, left - len(data))
        if data:
            if offset and again.digest() != known:
                raise _changed(response)
            yield data
    if left or (offset and again.digest() != known):
        raise _changed(response)


def _changed(response: httpx.Response) -> OSError:
    return OSError(f"{response.url} changed while it was read.")


@contextmanager
def _get(client: httpx.Client, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
    """The answer after all redirects. Bodies on the way are not read: they have no limit."""
    request: httpx.Request | None = client.build_request("GET", url, headers=headers)
    for _ in range(MAX_REDIRECTS + 1):
        assert request
        with closing(client.send(request, stream=True, follow_redirects=False)) as response:
            request = response.next_request
            if request is None:
                _check_status(url, response)
                yield response
                return
    raise InvalidUri(f"{url} redirects more than {MAX_REDIRECTS} times; name the file itself.")


def _check_status(url: str, response: httpx.Response) -> None:
    status = response.status_code
    if status in PASSING or response.is_server_error:
        response.raise_for_status()
    if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        raise InvalidUri(f"{url} answers {status} {response.reason_phrase}.")

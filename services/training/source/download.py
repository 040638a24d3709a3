"""Streams a file from a URL. If the network fails, the download resumes at the byte where it stopped."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import httpx

from services.uri import InvalidUri

MAX_BYTES = 2**36  # most bytes of one file: 64 GiB
MAX_REDIRECTS = 5
PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)  # pauses before the retries after failures in a row
PROGRESS_BYTES = 2**20  # a try that fails with fewer bytes counts as another failure in a row
RETRIED_STATUSES = (408, 425, 429)  # another try may succeed, as after statuses from 500


class Remote(NamedTuple):
    """A file to download: its name, size and URL."""

    name: str  # shown to the user
    size: int  # bytes; 0: the size is not known yet
    url: str


def download(
    client: httpx.Client, url: str, arrived: Callable[[int, int], None], broke_off: Callable[[httpx.HTTPError], None]
) -> Iterator[bytes]:
    """Downloads the file at `url`, and yields its bytes as the server stores them.

    For each yielded value, calls `arrived` with two numbers: how many bytes the value has, and the length of the whole
    file in bytes (0 if unknown). Calls `broke_off` with the error whenever the download is about to be tried again.
    Raises InvalidUri for errors that the user can fix, and httpx.HTTPError for errors that may be gone at a later try.
    """
    digest, offset, length, tag = hashlib.sha256(), 0, 0, ""
    failures = before = 0
    while True:
        try:
            with _get(client, url, _headers(offset, tag)) as response:
                if not offset:
                    length = int(response.headers.get("Content-Length", 0))
                    tag = _strong_tag(response.headers.get("ETag"))
                for data in _body_after(offset, digest, response):
                    offset += len(data)
                    if max(offset, length) > MAX_BYTES:
                        raise InvalidUri(
                            f"The file at {url} is larger than {MAX_BYTES // 2**30} GiB; split the file into several."
                        )
                    digest.update(data)
                    arrived(len(data), length)
                    yield data
                return
        except httpx.HTTPError as error:
            failures = 0 if offset - before >= PROGRESS_BYTES else failures
            before = offset
            if failures == len(PAUSES_SECONDS):
                raise
            broke_off(error)
            time.sleep(PAUSES_SECONDS[failures])
            failures += 1


def _headers(offset: int, tag: str) -> dict[str, str]:
    identity = {"Accept-Encoding": "identity"}
    return identity | ({"Range": f"bytes={offset}-", "If-Range": tag} if offset and tag else {})


def _strong_tag(tag: str | None) -> str:
    return "" if tag is None or tag.startswith("W/") else tag


def _body_after(offset: int, digest: Any, response: httpx.Response) -> Iterator[bytes]:
    """Yields the bytes of a response that come after the first `offset` bytes of the file.

    A server that cannot resume a download sends the first `offset` bytes again; the function skips them. `digest` is
    the sha256 of these bytes at their first download. Raises OSError if the file on the server has changed since then.
    """
    if response.status_code == httpx.codes.PARTIAL_CONTENT:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise _changed(response)
        yield from response.iter_raw()
        return
    first_digest, again, to_skip = digest.digest(), hashlib.sha256(), offset
    for data in response.iter_raw():
        again.update(data[:to_skip])
        data, to_skip = data[to_skip:], max(0, to_skip - len(data))
        if data:
            if offset and again.digest() != first_digest:
                raise _changed(response)
            yield data
    if to_skip or (offset and again.digest() != first_digest):
        raise _changed(response)


def _changed(response: httpx.Response) -> OSError:
    return OSError(f"The file at {response.url} changed while it was being read.")


@contextmanager
def _get(client: httpx.Client, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
    """Requests `url` with the HTTP headers `headers`, follows redirects, and yields the last response.

    The content of a redirect is not read, because it may be endless. Raises httpx.HTTPStatusError for a status after
    which another try may succeed: 408, 425, 429, and 500 or higher. Raises InvalidUri for every other refusal, and for
    too many redirects.
    """
    request: httpx.Request | None = client.build_request("GET", url, headers=headers)
    for _ in range(MAX_REDIRECTS + 1):
        assert request
        with closing(client.send(request, stream=True, follow_redirects=False)) as response:
            request = response.next_request
            if request is None:
                _check_status(url, response)
                yield response
                return
    raise InvalidUri(f"{url} redirects more than {MAX_REDIRECTS} times; give the URL of the file itself.")


def _check_status(url: str, response: httpx.Response) -> None:
    status = response.status_code
    if status in RETRIED_STATUSES or response.is_server_error:
        response.raise_for_status()
    if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        raise InvalidUri(
            f"The request for {url} was answered with {status} {response.reason_phrase}; "
            "check the URL and who may read it."
        )

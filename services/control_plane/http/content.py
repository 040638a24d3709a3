"""Answers requests for the bytes of a file in storage, or for a range of these bytes.

Ranges allow clients to resume interrupted downloads.
"""

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar
from cachetools import LRUCache
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from services import storage
from services.control_plane.core.errors import RangeNotSatisfiable

CHUNK = 1 << 20
# One range of bytes, as RFC 9110 writes it. The service ignores other `Range` headers, as the RFC allows.
RANGE = re.compile(r"bytes=(?!-$)([0-9]{0,18})-([0-9]{0,18})")
DIGESTS_AT_ONCE = 2  # how many files are read at the same time only to compute their digests
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("digests at once")
_digests: LRUCache[str, bytes] = LRUCache(1000)  # SHA-256 by ETag, of contents that were read to their end


@dataclass(frozen=True)
class Content:
    """The bytes of a download, with their number, ETag, file name and media type. The bytes never change while `etag`
    stays the same.
    """

    num_bytes: int
    etag: str  # without quotes
    filename: str
    media_type: str
    read: Callable[[range], Iterator[bytes]]  # reads a range of the bytes, in a thread
    sha256: bytes | None = None  # None: not known yet


async def answer(request: Request, content: Content) -> Response:
    """Returns the response with the whole content, or with the part that the headers `Range` and `If-Range` ask for.

    A client that sends `Want-Repr-Digest: sha-256=1` (RFC 9530) gets the digest of the whole content in `Repr-Digest`.
    Raises RangeNotSatisfiable if the content has none of the bytes that are asked for.
    """
    span, status = range(content.num_bytes), 200
    headers = {"accept-ranges": "bytes", "etag": f'"{content.etag}"', **_attached(content.filename)}
    if (asked := RANGE.fullmatch(request.headers.get("range", ""))) and _is_same(request, content):
        span, status = _part(asked, content.num_bytes), 206
        if not span:
            message = (
                f"The header Range asks for '{asked[0]}', but the file has only {content.num_bytes} bytes; "
                "ask for earlier bytes."
            )
            raise RangeNotSatisfiable(message, content.num_bytes)
        headers["content-range"] = f"bytes {span.start}-{span.stop - 1}/{content.num_bytes}"
    if "sha-256" in request.headers.get("want-repr-digest", ""):
        headers["repr-digest"] = f"sha-256=:{base64.b64encode(await _digest(content)).decode()}:"
    headers["content-length"] = str(len(span))
    chunks = content.read(span) if len(span) < content.num_bytes else _noting_digest(content)
    # Storage that does not answer is noticed at the first chunk, before the status is sent.
    first = await anyio.to_thread.run_sync(next, chunks, b"")
    return StreamingResponse(_in_threads(first, chunks), status, headers, media_type=content.media_type)


def read_file(uri: str, span: range) -> Iterator[bytes]:
    """Yields the bytes of the file at `uri` whose positions are in `span`. Raises OSError if the file is too short."""
    with storage.open_input(uri) as source:
        source.seek(span.start)
        left = len(span)
        while left:
            if not (chunk := source.read(min(left, CHUNK))):
                raise OSError(f"The stored file is damaged: it ends {left} bytes too early.")
            left -= len(chunk)
            yield chunk


def _is_same(request: Request, content: Content) -> bool:
    """Whether the client may get a range of this content: the header `If-Range` is missing, or it names the content's
    ETag. With another ETag, the range would not fit the part that the client already has.
    """
    return request.headers.get("if-range") in (None, f'"{content.etag}"')


def _attached(filename: str) -> dict[str, str]:
    name = re.sub(r"[^A-Za-z0-9._-]", "_", filename)
    return {"content-disposition": f'attachment; filename="{name}"', "x-content-type-options": "nosniff"}


def _part(asked: re.Match[str], num_bytes: int) -> range:
    """Returns the range of bytes that the `Range` header `asked` asks for, in a file of `num_bytes` bytes. Returns an
    empty range if the file has none of these bytes.
    """
    first, last = asked[1], asked[2]
    if not first:  # the last bytes of the file
        return range(max(0, num_bytes - int(last)), num_bytes)
    return range(int(first), min(int(last) + 1, num_bytes) if last else num_bytes)


async def _digest(content: Content) -> bytes:
    """Returns the SHA-256 of all bytes of a download. Reads the bytes if the digest is not known yet."""
    if found := content.sha256 or _digests.get(content.etag):
        return found
    try:
        limiter = _limiter.get()
    except LookupError:
        _limiter.set(limiter := anyio.CapacityLimiter(DIGESTS_AT_ONCE))
    await anyio.to_thread.run_sync(_exhaust, _noting_digest(content), limiter=limiter)
    return _digests[content.etag]


def _exhaust(chunks: Iterator[bytes]) -> None:
    for _ in chunks:
        pass


def _noting_digest(content: Content) -> Iterator[bytes]:
    """Yields all bytes of a download. If the caller reads all of them, keeps their SHA-256 for later requests."""
    digest = hashlib.sha256()
    for chunk in content.read(range(content.num_bytes)):
        digest.update(chunk)
        yield chunk
    _digests[content.etag] = digest.digest()


async def _in_threads(first: bytes, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yields the chunk `first`, and then all chunks of the iterator `chunks`. Reads each chunk of `chunks` in a thread,
    because the reading blocks.
    """
    yield first
    while chunk := await anyio.to_thread.run_sync(next, chunks, b""):
        yield chunk

"""The spool: an attempt's reports in storage, in numbered segments that are each written once.

A segment `<run>/spool/<attempt>/<first seq>.json` has two lines: an `EventBatch`, and the sha256 of the first line.
"""

import hashlib

from pydantic import ValidationError

from services import storage
from services.contract import EventBatch


class DamagedSegment(ValueError):
    """A segment's content is not what was written."""


def folder(run_uri: str, attempt: int) -> str:
    return storage.join(run_uri, "spool", str(attempt))


def segment_uri(run_uri: str, attempt: int, first_seq: int) -> str:
    return storage.join(folder(run_uri, attempt), f"{first_seq:08d}.json")


def segments(run_uri: str, attempt: int) -> list[tuple[int, str]]:
    """Returns the number of each segment's first report with the segment's URI, in order."""
    names = storage.list_files(folder(run_uri, attempt))
    firsts = [int(name.removesuffix(".json")) for name in names if name.endswith(".json")]
    return [(first, segment_uri(run_uri, attempt, first)) for first in sorted(firsts)]


def write(uri: str, body: bytes) -> None:
    """Writes a segment. `body` is an EventBatch as JSON without line feeds."""
    storage.write_bytes(uri, body + b"\n" + _digest(body))


def read_body(uri: str) -> bytes:
    """Returns the `body` of a segment. Raises DamagedSegment or FileNotFoundError."""
    body, _, digest = storage.read_bytes(uri).partition(b"\n")
    if digest != _digest(body):
        raise DamagedSegment(f"{uri} does not match its sha256")
    return body


def read(uri: str) -> EventBatch:
    """Returns the events of a segment. Raises DamagedSegment or FileNotFoundError."""
    try:
        return EventBatch.model_validate_json(read_body(uri))
    except ValidationError:
        raise DamagedSegment(f"{uri} has no readable reports") from None


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode() + b"\n"

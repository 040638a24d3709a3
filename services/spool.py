"""Reads and writes the spool: the files in storage that hold the reports of an attempt (one run of a job on Ray).

A report is a message of the attempt to the control plane, such as metrics. A file of the spool is called a segment. Its
path is `<run>/spool/<attempt>/<first seq>.json`, where `first seq` is the number of its first report. Each segment is
written once and has two lines: an `EventBatch`, and the sha256 of the first line.
"""

import hashlib

from pydantic import ValidationError

from services import storage
from services.contract import EventBatch


class DamagedSegment(ValueError):
    """Raised if a file of the spool (an attempt's stored reports; an attempt is one run of a job) does not match its
    sha256 or cannot be parsed."""


def folder(run_uri: str, attempt: int) -> str:
    return storage.join(run_uri, "spool", str(attempt))


def segment_uri(run_uri: str, attempt: int, first_seq: int) -> str:
    return storage.join(folder(run_uri, attempt), f"{first_seq:08d}.json")


def segments(run_uri: str, attempt: int) -> list[tuple[int, str]]:
    """Returns the files in which an attempt (one run of a job) stored its reports, in the order of the reports. Each
    file is a pair: the number of its first report, and its URI. `run_uri` is the job's folder in storage."""
    names = storage.list_files(folder(run_uri, attempt))
    firsts = [int(name.removesuffix(".json")) for name in names if name.endswith(".json")]
    return [(first, segment_uri(run_uri, attempt, first)) for first in sorted(firsts)]


def write(uri: str, body: bytes) -> None:
    """Writes a file of the spool, the stored reports of an attempt (one run of a job). Adds the sha256 of the reports.

    `body` holds the reports: an EventBatch as JSON without line feeds.
    """
    storage.write_bytes(uri, body + b"\n" + _digest(body))


def read_body(uri: str) -> bytes:
    """Returns the content of a file of the spool, the stored reports of an attempt (one run of a job): an EventBatch as
    JSON.

    Raises FileNotFoundError if the file is missing, and DamagedSegment if its content does not match its sha256.
    """
    body, _, digest = storage.read_bytes(uri).partition(b"\n")
    if digest != _digest(body):
        raise DamagedSegment(f"the file {uri} is damaged: it does not match its sha256")
    return body


def read(uri: str) -> EventBatch:
    """Returns the reports in a file of the spool, the stored reports of an attempt (one run of a job).

    Raises FileNotFoundError if the file is missing, and DamagedSegment if the file does not match its sha256 or cannot
    be parsed.
    """
    try:
        return EventBatch.model_validate_json(read_body(uri))
    except ValidationError:
        raise DamagedSegment(f"the file {uri} has no reports that can be read") from None


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode() + b"\n"

"""Reads the logs of a job's processes from storage, where the processes write them."""

import math
from collections.abc import Iterator
from typing import Any

from services import storage
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.settings import Settings

PAGE_BYTES = 2**20


def page(
    settings: Settings, job_id: str, *, attempt: int | None, source: str, after: int, limit: int
) -> dict[str, Any]:
    """Returns the API's JSON object of one page of a log: at most `limit` lines, from byte `after` of the log on. The
    object's field `next` is the byte at which the next page begins.

    `attempt` is the number of a run of the job on Ray; None means the newest run. `source` is the process, such as
    `driver` or `worker-0`. Raises InvalidRequest if this run has no logs but other runs of the job have some. If no run
    has logs, the page is empty.
    """
    folder = storage.join(settings.storage_url, "runs", job_id, "logs")
    attempts = sorted(map(int, storage.list_folders(folder)))
    if attempt is None:
        attempt = max(attempts, default=1)
    if attempts and attempt not in attempts:
        message = (
            f"The query parameter 'attempt' is {attempt}, but the job has logs only of the attempts {attempts}; "
            "choose one of these attempts."
        )
        raise InvalidRequest(message, param="attempt")
    sources = storage.list_folders(storage.join(folder, str(attempt)))
    lines: list[str] = []
    following, num_bytes, has_more = after, 0, False
    for end, line in _lines(storage.join(folder, str(attempt), source), after):
        if has_more := len(lines) == limit or num_bytes > PAGE_BYTES:
            break
        lines.append(line)
        following, num_bytes = end, num_bytes + len(line)
    shown = {"attempt": attempt, "attempts": attempts, "source": source, "sources": sources}
    return {"object": "job.logs", **shown, "data": lines, "next": following, "has_more": has_more}


def _lines(folder: str, after: int) -> Iterator[tuple[int, str]]:
    """Yields the lines of the log in `folder` from byte `after` on, as pairs: the byte at which the next line begins,
    and the line.

    Where a part of the log was left out, yields a line that says so.
    """
    names = storage.list_files(folder)
    firsts = [int(name.removesuffix(".log")) for name in names]
    at = after
    for first, end, name in zip(firsts, [*firsts[1:], math.inf], names, strict=False):
        if end <= at:
            continue
        if at < first:
            yield first, f"... {first - at} bytes were left out, because the log is too long ..."
            at = first
        for line in storage.read_bytes(storage.join(folder, name))[at - first :].splitlines(keepends=True):
            at += len(line)
            yield at, line.decode(errors="replace").rstrip("\n")

"""What driver and workers of a job printed, as their attempts kept it in storage."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from typing import Any

from services import storage
from services.control_plane.errors import InvalidRequest
from services.control_plane.settings import Settings

DRIVER = "driver"
PAGE_BYTES = 2**20


def page(
    settings: Settings, job_id: str, *, attempt: int | None, source: str, after: int, limit: int
) -> dict[str, Any]:
    """Lines from byte `after` on, and the byte that the next page begins after. None: the newest attempt."""
    folder = storage.join(settings.storage_url, "runs", job_id, "logs")
    attempts = sorted(int(name) for name in _folders(folder))
    if attempt is None:
        attempt = attempts[-1] if attempts else 1
    sources = _folders(storage.join(folder, str(attempt))) if attempt in attempts else []
    if sources and source not in sources:
        raise InvalidRequest(f"Attempt {attempt} has logs of {', '.join(sources)}, not of '{source}'.", param="source")
    if attempts and attempt not in attempts:
        raise InvalidRequest(f"There are logs of attempts {attempts}, not of {attempt}.", param="attempt")
    lines, following, more = _page(storage.join(folder, str(attempt), source), after, limit)
    return {
        "object": "fine_tuning.job.logs",
        "attempt": attempt,
        "attempts": attempts,
        "source": source,
        "sources": sources,
        "data": lines,
        "next": following,
        "has_more": more,
    }

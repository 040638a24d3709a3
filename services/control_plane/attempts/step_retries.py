"""Decides when a job whose next step failed is tried again: after 0, 1, 3, 7 and more seconds, at most 60.

It is tried without end while the database, storage or Ray are away, otherwise a limited number of times.
"""

from collections.abc import Callable

import httpx
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection

from services.contract import storable
from services.control_plane.core.store import refuses_value
from services.control_plane.ray_api import rays_words

LONGEST_PAUSE_SECONDS = 60.0
EVENT_AFTER = 4  # failed tries, about ten seconds; then an event says so
TRIES = 15  # failed tries, about ten minutes; then the job fails


class Patience:
    """Counts failed tries, in this process only. A job whose version changed is tried again at once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failed: dict[str, tuple[int, int, float]] = {}  # by job: version, tries, when the next is due

    def is_due(self, job_id: str, version: int) -> bool:
        failed_in, _, due_at = self._failed.get(job_id, (version, 0, float("-inf")))
        return failed_in != version or self._clock() >= due_at

    def fail(self, job_id: str, version: int) -> int:
        """Notes a failure. Returns how many there were in a row, with this one."""
        failed_in, tries, _ = self._failed.get(job_id, (version, 0, 0.0))
        tries = tries + 1 if failed_in == version else 1
        pause = min(2.0 ** (tries - 1) - 1, LONGEST_PAUSE_SECONDS)
        self._failed[job_id] = (version, tries, self._clock() + pause)
        return tries

    def forget(self, job_id: str) -> None:
        """Forgets the failures of a job, because its step succeeded."""
        self._failed.pop(job_id, None)


def is_ours(error: Exception) -> bool:
    """Whether the error is about this job, and does not mean that the database, storage or Ray are away."""
    if isinstance(error, DBAPIError):
        return refuses_value(error)
    return not isinstance(error, NoConnection | httpx.HTTPError | OSError)


def in_words(error: Exception) -> str:
    """Describes the error for the user, without SQL statements, values and addresses."""
    match error:
        case DBAPIError() if refuses_value(error):
            return storable(f"the database refuses a value: {str(error.orig).partition(chr(10))[0]}")
        case DBAPIError() | NoConnection():
            return "the database does not answer"
        case httpx.HTTPStatusError():
            return f"Ray answers {error.response.status_code}: {rays_words(error.response.text)}"
        case httpx.HTTPError():
            return "Ray does not answer"
        case OSError():
            return f"storage fails: {error.strerror or type(error).__name__}"
        case _:
            return storable(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")

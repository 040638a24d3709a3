"""Decides when a job is handled again after an error in handling it. The pauses after errors in a row are 0, 1, 3, 7
and so on seconds long, but at most 60.

The reconciler, the background task that handles all jobs, uses this module. While the database, storage or Ray are
down, the reconciler tries again without end. After other errors, it tries a limited number of times.
"""

from collections.abc import Callable

import httpx
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection

from services.contract import storable
from services.control_plane.core.store import refuses_value
from services.control_plane.ray_api import rays_words

LONGEST_PAUSE_SECONDS = 60.0
EVENT_AFTER = 4  # after this many failed tries (about ten seconds), the job gets an event
TRIES = 15  # after this many failed tries (about ten minutes), the job fails


class Patience:
    """Counts the failed tries to handle each job, and says when the next try is due.

    The counts are in memory only, and are lost when this process ends. A job whose version (the number of its state
    changes) has changed is tried again immediately.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failed: dict[str, tuple[int, int, float]] = {}  # by job: version, tries, time of the next try

    def is_due(self, job_id: str, version: int) -> bool:
        failed_in, _, due_at = self._failed.get(job_id, (version, 0, float("-inf")))
        return failed_in != version or self._clock() >= due_at

    def fail(self, job_id: str, version: int) -> int:
        """Counts a failed try to handle the job, and sets the time of the next try. `version` is the number of the
        job's state changes so far. If the version has changed since the last failed try, the count begins again at 1.

        Returns the number of failed tries of this version in a row, including this one.
        """
        failed_in, tries, _ = self._failed.get(job_id, (version, 0, 0.0))
        tries = tries + 1 if failed_in == version else 1
        pause = min(2.0 ** (tries - 1) - 1, LONGEST_PAUSE_SECONDS)
        self._failed[job_id] = (version, tries, self._clock() + pause)
        return tries

    def forget(self, job_id: str) -> None:
        """Resets the job's count of failed tries. Call this method after the job was handled without an error."""
        self._failed.pop(job_id, None)


def is_ours(error: Exception) -> bool:
    """Whether an error in handling a job concerns only this job. Returns False if the database, storage or Ray are
    down.
    """
    if isinstance(error, DBAPIError):
        return refuses_value(error)
    return not isinstance(error, NoConnection | httpx.HTTPError | OSError)


def in_words(error: Exception) -> str:
    """Returns a description of the error for the user, without SQL statements, values and addresses."""
    match error:
        case DBAPIError() if refuses_value(error):
            return storable(f"the database refused a value: {str(error.orig).partition(chr(10))[0]}")
        case DBAPIError() | NoConnection():
            return "the database does not answer"
        case httpx.HTTPStatusError():
            return f"Ray answered with status {error.response.status_code}: {rays_words(error.response.text)}"
        case httpx.HTTPError():
            return "the Ray cluster does not answer"
        case OSError():
            return f"the storage failed: {error.strerror or type(error).__name__}"
        case _:
            return storable(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")

"""Repeats work while storage is full or does not answer, so that the job waits and does not fail."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ray.exceptions import RayTaskError

from services import storage
from services.contract import Message, Report
from services.deaths import NO_BUCKET, REFUSED

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 60.0  # between two calls; doubles with each call that fails
MOST_AWAY_SECONDS = 600.0  # how long storage may not answer at a time; then the attempt ends, and the next one resumes

Result = TypeVar("Result")


def retry_while_unavailable(write: Callable[[], Result], what: str, report: Callable[[Report], object]) -> Result:
    """Calls `write`, and returns its result. If `write` or one of its Ray tasks fails because storage is unavailable,
    calls `write` again. How often depends on the reason:

    - Storage is full: without limit, until a call succeeds.
    - Storage does not answer: for ten minutes at most; then raises the error. The ten minutes begin with the first such
      error. They begin again if a call shows that storage has answered meanwhile: the call found storage full, or ran
      for more than ten minutes.

    The user is told once that the work waits. `what` names the work in this message, such as "exporting the policy".
    """
    reported, pause = "", FIRST_PAUSE_SECONDS
    away_since: float | None = None
    while True:
        began = time.monotonic()
        try:
            return write()
        except (OSError, RayTaskError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            failed = time.monotonic()
            if not _is_away(cause):
                away_since = None
            elif away_since is None or failed - began > MOST_AWAY_SECONDS:
                away_since = failed
            if storage.is_full(cause):
                sentence = (
                    f"The storage is full; {what} waits until there is room. The operator has to free some space."
                )
            elif away_since is not None and failed - away_since < MOST_AWAY_SECONDS:
                sentence = f"The storage does not answer; {what} waits for it, ten minutes at most."
            else:
                raise
            logger.warning("%s %s", sentence, cause)
        if sentence != reported:
            reported, pause = sentence, FIRST_PAUSE_SECONDS
            report(Message(level="warn", message=sentence))
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _is_away(error: BaseException) -> bool:
    return storage.is_away(error) and not any(reason.search(str(error)) for reason in (REFUSED, NO_BUCKET))

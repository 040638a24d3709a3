"""Repeats work while storage is full, so that the job waits for free space and does not fail."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ray.exceptions import RayTaskError

from services import storage
from services.contract import Message, Report

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 5.0

Result = TypeVar("Result")


def retry_while_full(write: Callable[[], Result], what: str, report: Callable[[Report], object]) -> Result:
    """Calls `write`, and returns its result. If `write` or one of its Ray tasks fails because storage is full, calls
    `write` again and again until it succeeds.

    The user is told once that the work waits. `what` names the work in this message, such as "exporting the policy".
    """
    reported = False
    while True:
        try:
            return write()
        except (OSError, RayTaskError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if not storage.is_full(cause):
                raise
            sentence = f"The storage is full; {what} waits until there is room. The operator has to free some space."
            logger.warning("%s %s", sentence, cause)
        if not reported:
            reported = True
            report(Message(level="warn", message=sentence))
        time.sleep(PERIOD_SECONDS)

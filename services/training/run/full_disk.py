"""Storage that is full: what a job would write waits until there is room, instead of failing the job."""

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


def when_there_is_room(write: Callable[[], Result], what: str, report: Callable[[Report], object]) -> Result:
    """What `write` returns; it is called again while storage is full, here or where a task or an actor wrote."""
    told = False
    while True:
        try:
            return write()
        except (OSError, RayTaskError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if not storage.is_full(cause):
                raise
            sentence = f"Storage is full; {what} waits for room, which its operator has to make."
            logger.warning("%s %s", sentence, cause)
        if not told:
            told = True
            report(Message(level="warn", message=sentence))
        time.sleep(PERIOD_SECONDS)

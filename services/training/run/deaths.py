"""Finds out from exceptions why an attempt (one run of a job) or its workers died."""

import traceback
from collections.abc import Mapping

from services.deaths import cause_in


def cause_of(*errors: BaseException) -> str:
    """Finds out from exceptions why an attempt (one run of a job) or its workers died, and returns the reason as a text
    for the user.

    If a worker was killed, the text names the kill, and not the errors that other workers then had.
    """
    raised = [inner for error in errors for inner in _inner(error)]
    text = "\n".join("".join(traceback.format_exception(each)) for each in raised)
    return cause_in(text) or type(raised[0]).__name__


def _inner(error: BaseException) -> list[BaseException]:
    """Returns the errors that an error of Ray Train contains: those of its workers, or of its controller. For any other
    error, returns a list with the error itself."""
    workers: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    return list(workers.values()) or [getattr(error, "controller_failure", error)]

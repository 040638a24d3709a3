"""Finds out from exceptions why an attempt (one run of a job) or its workers died."""

import traceback
from collections.abc import Mapping

from services.deaths import cause_in


def cause_of(*errors: BaseException) -> str:
    """Returns the cause of the errors as text for the user.

    If a worker was killed, the cause is the kill, and not the errors of other workers.
    """
    raised = [inner for error in errors for inner in _inner(error)]
    text = "\n".join("".join(traceback.format_exception(each)) for each in raised)
    return cause_in(text) or type(raised[0]).__name__


def _inner(error: BaseException) -> list[BaseException]:
    """Returns the errors of workers or of the controller inside an error of Ray Train, or else the error itself in a
    list."""
    workers: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    return list(workers.values()) or [getattr(error, "controller_failure", error)]

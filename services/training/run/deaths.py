"""Finds in exceptions why an attempt cannot go on, or why its workers died."""

import traceback
from collections.abc import Mapping

from services.deaths import cause_in


def cause_of(*errors: BaseException) -> str:
    """Returns the cause of the errors, for the user: a worker's kill if there is one, rather than others' errors."""
    raised = [inner for error in errors for inner in _inner(error)]
    text = "\n".join("".join(traceback.format_exception(each)) for each in raised)
    return cause_in(text) or type(raised[0]).__name__


def _inner(error: BaseException) -> list[BaseException]:
    """Returns the full errors of workers or controller that an error of Ray Train holds and quotes in part."""
    workers: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    return list(workers.values()) or [getattr(error, "controller_failure", error)]

"""Why an attempt cannot go on, or its workers died, where exceptions tell it."""

import traceback
from collections.abc import Mapping

from services.deaths import cause_in


def cause_of(*errors: BaseException) -> str:
    """The most telling cause: where one worker is killed, those that waited for it fail as well."""
    raised = [inner for error in errors for inner in _inner(error)]
    text = "\n".join("".join(traceback.format_exception(each)) for each in raised)
    return cause_in(text) or type(raised[0]).__name__


def _inner(error: BaseException) -> list[BaseException]:
    """Ray Train's errors cut short what its workers or its controller raised, and hold it."""
    workers: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    return list(workers.values()) or [getattr(error, "controller_failure", error)]

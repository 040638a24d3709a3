"""Why an attempt cannot go on, or its workers died, where an exception tells it."""

import traceback
from collections.abc import Mapping

from services.deaths import cause_in


def cause_of(error: BaseException) -> str:
    """`error` may be Ray Train's, which cuts short what its workers or its controller raised, and holds it."""
    workers: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    raised = list(workers.values()) or [getattr(error, "controller_failure", error)]
    text = "\n".join("".join(traceback.format_exception(each)) for each in raised)
    return cause_in(text) or type(raised[0]).__name__

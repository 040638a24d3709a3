"""Sets up the service's log, as text for people or as one JSON object per line.

Each log record also has the fields that the context manager `about` adds, such as the id of a job.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

from services.control_plane.core.telemetry import BACKGROUND_FAILURES

LogFormat = Literal["text", "json"]
_about: ContextVar[Mapping[str, Any]] = ContextVar("about")


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Adds the given fields (such as request_id, job_id, attempt) to every log record within the `with` block."""
    token = _about.set({**_about.get({}), **fields})
    try:
        yield
    finally:
        _about.reset(token)


class Trouble:
    """Tells the operator, in the log and in a metric, whether the passes of a background loop succeed. Such a loop
    never ends, even while, for example, the database is away. `part` names the part of the service that the loop
    belongs to.

    Each failed pass counts in a metric. The log gets a line for the 1st, 2nd, 4th, 8th and so on failure in a row, and
    one when a pass succeeds again.
    """

    def __init__(self, log: logging.Logger, part: str) -> None:
        self._log, self._part = log, part
        self._failures = 0  # in a row

    def failed(self, message: str, *values: object, exc_info: bool | BaseException = False) -> None:
        """Records that a pass of the loop failed. `message` says this in the log, with `values` in place of its `%s`.
        `exc_info` is the exception whose traceback the log shows, or True for the current one."""
        self._failures += 1
        BACKGROUND_FAILURES.labels(self._part).inc()
        if self._failures.bit_count() == 1:  # a power of two
            self._log.warning(f"{message} (failures in a row: %d)", *values, self._failures, exc_info=exc_info)

    def passed(self) -> None:
        """Records that a pass of the loop succeeded. If earlier passes failed, the log gets a line."""
        if self._failures:
            self._log.info("The part %s works again after %d failures in a row", self._part, self._failures)
        self._failures = 0


def configure(log_format: LogFormat, file: Path) -> None:
    """Sends the service's log to `file` as text, for people. If `log_format` is `json`, sends the log to standard error
    as JSON instead, for a program that collects logs.
    """
    handler: logging.Handler
    if log_format == "json":
        handler = logging.StreamHandler()
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter("%(asctime)s%(levelname)s%(name)s%(message)s", rename_fields=names))
    else:
        handler = RotatingFileHandler(file, maxBytes=10 * 2**20, backupCount=3)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s%(about)s"))
    handler.addFilter(lambda record: _add_fields(record, in_words=log_format == "text"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO, httpx logs every request that we send


def _add_fields(record: logging.LogRecord, *, in_words: bool) -> bool:
    fields = _about.get({})
    if in_words:
        record.about = "".join(f" {name}={value}" for name, value in fields.items())
    else:
        vars(record).update({name: value for name, value in fields.items() if name not in vars(record)})
    return True

"""Copies a job's metrics from its reports in storage (the spool) to one service: W&B, MLflow or TensorBoard.

The object that writes to a service is called a sink. If a sink fails, a new one is opened later.
"""

import logging
import os
import re
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from services import spool
from services.contract import AttemptSpec, EventBatch, JobEvent, Message, Report, Started, StepMetrics
from services.spool import DamagedSegment
from services.training.reports.integrations.sink import Sink, Status, Step

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 30.0  # between two reads of the spool
RETRY_SECONDS = 60.0
SLOW_SECONDS = 60.0  # duration of a sink's call after which the user is warned
STEPS_PER_WRITE = 1000
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

Open = Callable[[AttemptSpec, Path], Sink]
"""A function that opens a sink. The sink may keep files in the folder until the sink is closed."""


class Follower:
    """A Ray actor that copies a job's metrics to one service (W&B, MLflow or TensorBoard) during one attempt (one run
    of the job). The object that writes to the service is called a sink.

    The methods of a follower never raise an error. The follower tells the user about the first error of its sink.
    """

    def __init__(self, name: str, open_sink: Open, spec: AttemptSpec, report: Callable[[Report], None]) -> None:
        self._name, self._open, self._spec, self._report = name, open_sink, spec, report
        self._status: Status | None = None
        self._warned = self._announced = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self, status: Status | None, timeout_seconds: float) -> None:
        """Tells the follower to end once all metrics of the job's reports in storage are copied to the service, and
        waits for its end, at most `timeout_seconds`.

        `status` says how the job ended (None: another attempt may resume it), and is passed to Sink.close. After this
        call the follower reports nothing more to the user.
        """
        self._status = status
        self._closing.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive() and status is not None:
            self._warn(
                f"the metrics of the last steps could not be sent within {timeout_seconds:.0f} s, "
                "so the integration lacks them"
            )
        self._announced = self._warned = True

    def _work(self) -> None:
        while True:
            last_try = self._closing.is_set()
            try:
                with tempfile.TemporaryDirectory(prefix="raydpo-integration-", ignore_cleanup_errors=True) as folder:
                    self._follow(Path(folder))
                return
            except ImportError as error:
                self._warn(
                    f"the Ray cluster lacks the Python package {error.name}; "
                    "the operator must build its image with raydpo[cluster]"
                )
                return
            except Exception as error:  # any error, because training must not fail by an integration
                logger.warning(
                    "%s failed: %s", self._name, _without_secrets("".join(traceback.format_exception(error)))
                )
                self._warn(f"{_reason(error)}; sending is tried again every {RETRY_SECONDS:.0f} s")
            if last_try:
                return
            self._closing.wait(RETRY_SECONDS)

    def _follow(self, folder: Path) -> None:
        """Opens a sink (an object that writes to a service such as MLflow), and copies the job's metrics to it until
        the follower is closed.

        Returns after `close` was called and all reports in storage are copied.
        """
        with self._warning_if_slow():
            sink = self._open(self._spec, folder)
        if not self._announced:
            self._announced = True
            self._report(Message(message=f"{self._name}: {sink.where}"))
        begun, closing, steps = False, False, list[Step]()
        last_step = sink.last_step
        for batch in _spooled(self._spec):
            for event in batch.events if batch else ():
                if isinstance(event.report, Started) and not begun:
                    begun = True
                    with self._warning_if_slow():
                        sink.begin(event.report)
                elif isinstance(event.report, StepMetrics) and event.report.step > last_step:
                    last_step = event.report.step
                    steps.append(_step(event, event.report))
            if steps and (batch is None or len(steps) >= STEPS_PER_WRITE):
                with self._warning_if_slow():
                    sink.write(steps)
                steps = []
            if batch is None:
                if closing:
                    return sink.close(self._status)
                closing = self._closing.wait(PERIOD_SECONDS)
        return None

    @contextmanager
    def _warning_if_slow(self) -> Iterator[None]:
        timer = threading.Timer(
            SLOW_SECONDS, self._warn, [(f"the integration has not answered for {SLOW_SECONDS:.0f} s")]
        )
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._report(Message(level="warn", message=f"{self._name}: {reason}. The training itself continues."))


def _spooled(spec: AttemptSpec) -> Iterator[EventBatch | None]:
    """Yields the reports of the job that are in storage, file by file: first those of the first attempt (run of the
    job), at last those of this attempt.

    Yields None whenever the next file is not there yet. After a None, the caller may ask again for the next file.
    """
    for attempt in range(1, spec.attempt + 1):
        next_seq, lost = 0, False
        while True:
            if lost:  # the segment's length is unknown, so list the segments to find the next
                later = (first for first, _ in spool.segments(spec.run_uri, attempt) if first >= next_seq)
                next_seq = min(later, default=next_seq)
            try:
                batch = spool.read(spool.segment_uri(spec.run_uri, attempt, next_seq))
            except FileNotFoundError:
                if attempt < spec.attempt:
                    break
                yield None
            except DamagedSegment as error:
                logger.warning("A damaged file of stored reports is skipped: %s", error)
                next_seq, lost = next_seq + 1, True
            else:
                next_seq, lost = batch.events[-1].seq + 1, False
                yield batch


def _step(event: JobEvent, report: StepMetrics) -> Step:
    names = {key: key if key.startswith("eval/") else f"train/{key}" for key in report.metrics}
    return Step(report.step, event.created_at, {names[key]: value for key, value in report.metrics.items()})


def _reason(error: Exception) -> str:
    """Returns the error's message in one line, without secrets such as API keys."""
    return _without_secrets(" ".join(str(error).split()) or repr(error))[:300]


def _without_secrets(text: str) -> str:
    for name in SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, f"${name}")
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)  # removes a user and a password before a host

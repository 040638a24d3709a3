"""What a running attempt is told to do: by the user, by SIGTERM, by the attempt after it."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError

from services.contract import Paused, Report
from services.training.reports.reporting import Order
from services.training.run.deaths import cause_of

logger = logging.getLogger(__name__)

FENCED, PAUSED, CANCELLED = 3, 4, 5  # how the driver exits
PERIOD_SECONDS = 1.0
CLOSE_SECONDS = 1.0
GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"  # from SIGTERM to SIGKILL; Ray's own, and its own default:
DEFAULT_GRACE_SECONDS = 3.0


@contextmanager
def listening(reporter: Any) -> Iterator[Callable[[], bool]]:
    """Of a worker: whether to pause, as was known a moment ago. Asking waits for nobody."""
    order, done = "run", threading.Event()

    def listen() -> None:
        nonlocal order
        while not done.is_set():
            try:
                order = ray.get(reporter.order.remote())
            except RayError:
                logger.exception("The reporter is gone, and its driver with it.")
                return
            done.wait(PERIOD_SECONDS)

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield lambda: order == "pause"
    finally:
        done.set()


class Obedience:
    """The driver's: it beats, and ends the attempt when it is told to, unless the attempt is ending by itself."""

    def __init__(self, reporter: Any, followers: Sequence[Any]) -> None:
        self._reporter, self._followers = reporter, followers
        self._ending = threading.Lock()  # whoever holds it ends the attempt, and keeps it
        signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._listen, daemon=True).start()

    def end(self) -> None:
        """From here on the attempt ends by itself. Does not return if it is being ended."""
        self._ending.acquire()

    def _listen(self) -> None:
        while True:
            try:
                order, workers_listen = ray.get(self._reporter.beat.remote())
            except RayError as error:
                logger.error("The reporter is gone, and with it the attempt: %s", cause_of(error))
                self._leave(1)
                return
            self._obey(order, workers_listen)
            time.sleep(PERIOD_SECONDS)

    def _obey(self, order: Order, workers_listen: bool) -> None:
        match order:
            case "fenced":
                self._leave(FENCED)
            case "cancel":
                self._leave(CANCELLED)
            case "pause" if not workers_listen:  # nothing trains: what was prepared is kept
                self._leave(PAUSED, Paused(step=0))

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        threading.Thread(target=self._pause_within, args=(128 + signum,), daemon=True).start()

    def _pause_within(self, status: int) -> None:
        """As for a pause; what takes longer than SIGKILL waits is given up."""
        grace = float(os.environ.get(GRACE_VARIABLE, DEFAULT_GRACE_SECONDS))
        logger.warning("SIGTERM: the attempt ends within %.0f s.", grace)
        self._reporter.pause.remote()
        time.sleep(max(0.0, grace - 3 * CLOSE_SECONDS))
        self._leave(status)

    def _leave(self, status: int, report: Report | None = None) -> None:
        if not self._ending.acquire(blocking=False):
            return
        logger.warning("The attempt ends with status %d.", status)
        try:
            if report:
                self._reporter.report.remote(report)
            closing = [each.close.remote(None, CLOSE_SECONDS) for each in self._followers if status != FENCED]
            closing.append(self._reporter.close.remote(CLOSE_SECONDS))
            ray.wait(closing, num_returns=len(closing), timeout=2 * CLOSE_SECONDS)
        finally:
            # Ray Data and Ray Train take longer to say goodbye than SIGKILL waits. Their actors die with the driver.
            os._exit(status)

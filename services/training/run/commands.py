"""Pauses or ends a running attempt (one run of a job) on a command.

Commands have three sources: the user, through the control plane; Ray, which sends SIGTERM; and a later attempt that
takes over.
"""

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
from services.training.reports.reporting import Command
from services.training.run.deaths import cause_of

logger = logging.getLogger(__name__)

FENCED, PAUSED, CANCELLED = 3, 4, 5  # exit statuses of the driver
PERIOD_SECONDS = 1.0
CLOSE_SECONDS = 1.0
GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray's setting of the time from SIGTERM to SIGKILL
DEFAULT_GRACE_SECONDS = 3.0  # Ray's default


@contextmanager
def pause_requests(reporter: Any) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells a training worker whether it should pause.

    The function never waits, because it only returns the latest known command. A thread asks `reporter`, the actor that
    knows the command, every PERIOD_SECONDS.
    """
    command, done = "run", threading.Event()

    def listen() -> None:
        nonlocal command
        while not done.is_set():
            try:
                command = ray.get(reporter.command.remote())
            except RayError:
                logger.exception("The actor that sends the job's reports has ended, and with it the job's driver.")
                return
            done.wait(PERIOD_SECONDS)

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield lambda: command == "pause"
    finally:
        done.set()


class Commands:
    """Ends the attempt (one run of a job) early if a command such as cancel demands this, and tells the reporter every
    second that the driver is alive.

    `reporter` is the actor that sends the attempt's reports, and `followers` are the actors that send metrics to other
    services. The object exists in the driver, the attempt's main program.
    """

    def __init__(self, reporter: Any, followers: Sequence[Any]) -> None:
        self._reporter, self._followers = reporter, followers
        self._ending = threading.Lock()  # the holder of the lock ends the attempt and never releases the lock
        signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._listen, daemon=True).start()

    def stop_handling(self) -> None:
        """Ignores commands from now on, so that the attempt (one run of a job) can end by itself.

        If a command is ending the attempt already, this method never returns.
        """
        self._ending.acquire()

    def _listen(self) -> None:
        while True:
            try:
                command, workers_listen = ray.get(self._reporter.beat.remote())
            except RayError as error:
                logger.error(
                    "The actor that sends the job's reports has ended, so the job's driver ends as well: %s",
                    cause_of(error),
                )
                self._leave(1)
                return
            self._handle(command, workers_listen)
            time.sleep(PERIOD_SECONDS)

    def _handle(self, command: Command, workers_listen: bool) -> None:
        match command:
            case "fenced":
                self._leave(FENCED)
            case "cancel":
                self._leave(CANCELLED)
            case "pause" if not workers_listen:  # no worker trains, and prepared data are kept
                self._leave(PAUSED, Paused(step=0))

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        threading.Thread(target=self._pause_within, args=(128 + signum,), daemon=True).start()

    def _pause_within(self, status: int) -> None:
        """Handles SIGTERM from Ray: asks the training workers to pause. Shortly before Ray would send SIGKILL, ends the
        attempt (one run of a job) with the exit status `status`, even if the workers have not paused by that time."""
        grace = float(os.environ.get(GRACE_VARIABLE, DEFAULT_GRACE_SECONDS))
        logger.warning("Ray sent SIGTERM, so this process saves a checkpoint and ends within %.0f s.", grace)
        self._reporter.pause.remote()
        time.sleep(max(0.0, grace - 3 * CLOSE_SECONDS))
        self._leave(status)

    def _leave(self, status: int, report: Report | None = None) -> None:
        if not self._ending.acquire(blocking=False):
            return
        logger.warning("This process ends with status %d.", status)
        try:
            if report:
                self._reporter.report.remote(report)
            closing = [each.close.remote(None, CLOSE_SECONDS) for each in self._followers if status != FENCED]
            closing.append(self._reporter.close.remote(CLOSE_SECONDS))
            ray.wait(closing, num_returns=len(closing), timeout=2 * CLOSE_SECONDS)
        finally:
            # Ray Data and Ray Train would close only after SIGKILL is due. Their actors die with the driver.
            os._exit(status)

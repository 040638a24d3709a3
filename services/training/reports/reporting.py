"""The way of reports out of an attempt: numbered, spooled to storage, shipped to the control plane.

The spool is the truth. Shipping is a convenience on top, so training never waits for the control plane.
What comes back is the user's wish; without anything to ship, an empty batch every few seconds asks for it.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import httpx
import ray

from services import spool, storage, tracing
from services.contract import (
    Alive,
    AttemptAddress,
    Desired,
    Died,
    Failed,
    JobEvent,
    Message,
    Paused,
    Progress,
    Report,
    Stage,
    Succeeded,
    Wish,
)
from services.spool import DamagedSegment
from services.training.reports.stages import Stretches

logger = logging.getLogger(__name__)

EVENTS_PER_SEGMENT = 500
BYTES_PER_SEGMENT = 2**18  # and one event: the control plane refuses posts above `max_json_bytes`, again and again
POST_TIMEOUT_SECONDS = 10.0
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.5, 15.0
HEARTBEAT_SECONDS = 3.0  # between posts
UNHEARD_SECONDS = 60.0  # without an answer, after which the heartbeat goes to the spool
WORKER_SECONDS = 10.0  # since a worker asked for orders, after which there is none to obey
DRIVER_SECONDS = 60.0  # without a word of the driver, after which the attempt has no heartbeat
SENTENCE_SECONDS = 60.0  # between two messages on one stage

HEARTBEAT = b'{"events":[]}'
WATCH = "watch"  # concurrency group of the actor: who asks for orders does not wait behind a slow spool
Order = Literal[Desired, "fenced"]
"""`fenced`: a later attempt has taken the job over, and this one must stop."""


class JobFailed(Exception):
    """The user's to mend: another attempt would fail alike."""

    def __init__(self, report: Failed) -> None:
        super().__init__(report)  # with which pickle makes it anew in another process
        self.report = report

    def __str__(self) -> str:
        return self.report.message


def invalid_file(message: str) -> Failed:
    """What is wrong with the training file."""
    return Failed(code="invalid_training_file", message=message, param="training_file")


def progress(report: Callable[[Report], None], stage: Stage, total: int, *, start: int = 0) -> Callable[[int], None]:
    """A function that reports how many of `total` are done: at once, then about once a second, and when all are.

    `start` were done before. Once a minute a sentence says so as well, with the time that is left at the rate so far.
    """
    began = told = time.monotonic()
    last = float("-inf")

    def done(number: int) -> None:
        nonlocal last, told
        now = time.monotonic()
        if number == total or now - last >= 1:
            last = now
            report(Progress(stage=stage, done=number, total=total))
        if now - told >= SENTENCE_SECONDS and start < number < total:
            told = now
            minutes = (now - began) / (number - start) * (total - number) / 60
            share = f"{number} of {total} ({number / total:.0%})"
            report(Message(message=f"{stage.capitalize()}: {share} done, about {minutes:.0f} min left."))

    done(start)
    return done


class Reporter:
    """One per attempt, because it numbers the events; in a job it is a Ray actor that driver and workers call."""

    def __init__(self, spec: AttemptAddress, token: str, *, period_seconds: float = 1.0) -> None:
        self.spool_uri = spool.folder(spec.run_uri, spec.attempt)
        if storage.list_uris(self.spool_uri):
            raise FileExistsError(
                f"Attempt {spec.attempt} has reported before, to {self.spool_uri}; start another one."
            )
        self._run_uri, self._attempt = spec.run_uri, spec.attempt
        self._events_url = spec.events_url
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._period_seconds = period_seconds
        self._next_seq = 0
        self._stretches = Stretches(spec.traceparent)
        self._pending: deque[tuple[int, bytes]] = deque()  # seq and event; reported, not yet in the spool
        self._segment: tuple[str, bytes] | None = None  # being written; kept unchanged until that succeeds
        self._unshipped: deque[str] = deque()  # segments' URIs
        self._ended = False
        self._order: Order = "run"  # as the control plane said last
        self._pausing = False
        self._answered_at = self._driver_at = time.monotonic()
        self._worker_at = float("-inf")
        self._closing = threading.Event()
        self._changed = threading.Condition()  # guards all of the above but _segment
        self._writing = threading.Lock()  # guards _segment
        for work in (self._spool_periodically, self._ship):
            threading.Thread(target=work, daemon=True).start()

    def report(self, report: Report) -> None:
        with self._changed:
            if self._ended:
                return  # workers go on for a moment after what ends the attempt
            self._ended = isinstance(report, Succeeded | Failed | Paused | Died)
            event = JobEvent(seq=self._next_seq, created_at=time.time(), report=report)
            # Encoded here: text that is no Unicode fails its reporter, and leaves no gap in the numbers.
            self._pending.append((self._next_seq, event.model_dump_json().encode()))
            self._next_seq += 1
            self._stretches.see(report, event.created_at)

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def order(self) -> Order:
        """What the workers are to do."""
        self._worker_at = time.monotonic()
        return self._order_now()

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def beat(self) -> tuple[Order, bool]:
        """The driver lives. What it is to do, and whether workers ask for orders, too."""
        now = self._driver_at = time.monotonic()
        return self._order_now(), now - self._worker_at < WORKER_SECONDS

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def pause(self) -> None:
        """Order a pause from here on, whatever the control plane wishes."""
        self._pausing = True

    def _order_now(self) -> Order:
        return "pause" if self._pausing and self._order == "run" else self._order

    def flush(self) -> None:
        """Returns when all that was reported so far stands in the spool."""
        with self._writing:
            while self._segment or self._pending:
                self._segment = self._segment or self._next_segment()
                uri, body = self._segment
                spool.write(uri, body)
                self._segment = None
                with self._changed:
                    self._unshipped.append(uri)
                    self._changed.notify_all()

    def close(self, timeout_seconds: float) -> bool:
        """Spools what is left and gives the shipper so much time for the rest. True if all arrived."""
        self.flush()
        with self._changed:
            self._stretches.end()
            self._changed.wait_for(lambda: self._order == "fenced" or not self._unshipped, timeout_seconds)
            self._closing.set()
            self._changed.notify_all()
            arrived = not self._unshipped
        tracing.flush()
        return arrived

    def _next_segment(self) -> tuple[str, bytes]:
        events: list[tuple[int, bytes]] = []
        num_bytes = 0
        with self._changed:
            while self._pending and len(events) < EVENTS_PER_SEGMENT and num_bytes < BYTES_PER_SEGMENT:
                events.append(self._pending.popleft())
                num_bytes += len(events[-1][1])
        uri = spool.segment_uri(self._run_uri, self._attempt, events[0][0])
        return uri, b'{"events":[' + b",".join(event for _, event in events) + b"]}"

    def _spool_periodically(self) -> None:
        while not self._closing.wait(self._period_seconds):
            try:
                self.flush()
            except OSError:
                logger.exception("The spool %s cannot be written; trying again.", self.spool_uri)

    def _ship(self) -> None:
        pause = FIRST_RETRY_SECONDS
        with httpx.Client(timeout=POST_TIMEOUT_SECONDS, headers=self._headers) as client:
            while self._order != "fenced":
                uri = self._next_unshipped()
                if self._closing.is_set():
                    return
                if uri is None and time.monotonic() - self._driver_at > DRIVER_SECONDS:
                    continue
                if self._post(client, uri):
                    pause = FIRST_RETRY_SECONDS
                else:
                    self._beat_in_spool()
                    self._closing.wait(pause)
                    pause = min(2 * pause, LAST_RETRY_SECONDS)

    def _next_unshipped(self) -> str | None:
        """Waits for a segment; None if none came in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._unshipped or self._closing.is_set(), HEARTBEAT_SECONDS)
            return self._unshipped[0] if self._unshipped else None

    def _post(self, client: httpx.Client, uri: str | None) -> bool:
        """Whether the control plane has the segment now. It knows a segment that it saw before by its numbers."""
        try:
            answer = client.post(self._events_url, content=spool.read_body(uri) if uri else HEARTBEAT)
            if answer.status_code == httpx.codes.CONFLICT:
                order: Order = "fenced"
            else:
                order = Wish.model_validate_json(answer.raise_for_status().content).desired
        except DamagedSegment as error:
            logger.error("A part of the spool is lost, and the control plane told of it when it reads on: %s", error)
            with self._changed:
                self._unshipped.popleft()
                self._changed.notify_all()
            return True
        except (httpx.HTTPError, OSError, ValueError) as error:
            logger.warning("%s was not shipped: %r", uri or "A heartbeat", error)
            return False
        with self._changed:
            self._order, self._answered_at = order, time.monotonic()
            if uri and order != "fenced":
                self._unshipped.popleft()
            self._changed.notify_all()
        return True

    def _beat_in_spool(self) -> None:
        """The control plane finds it there if this attempt cannot reach it."""
        if time.monotonic() - self._answered_at > UNHEARD_SECONDS:
            self._answered_at = time.monotonic()
            self.report(Alive())

"""The way of reports out of an attempt: numbered, spooled to storage, shipped to the control plane.

The spool is the truth: segments `spool/<attempt>/<first seq>.json`, each an `EventBatch`, each
written once. Shipping is a convenience on top, so training never waits for the control plane.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import httpx

from services import storage
from services.contract import AttemptSpec, Failed, JobEvent, Message, Progress, Report, Stage, Succeeded

logger = logging.getLogger(__name__)

EVENTS_PER_SEGMENT = 500
POST_TIMEOUT_SECONDS = 10.0
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.5, 15.0
SENTENCE_SECONDS = 60.0  # between two messages on one stage


class JobFailed(Exception):
    """The user's to mend: another attempt would fail alike."""

    def __init__(self, report: Failed) -> None:
        super().__init__(report.message)
        self.report = report


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


def segment_uri(run_uri: str, attempt: int, first_seq: int) -> str:
    return storage.join(run_uri, "spool", str(attempt), f"{first_seq:08d}.json")


class Reporter:
    """One per attempt, because it numbers the events; in a job it is a Ray actor that driver and workers call."""

    def __init__(self, spec: AttemptSpec, token: str, *, period_seconds: float = 1.0) -> None:
        self.spool_uri = storage.join(spec.run_uri, "spool", str(spec.attempt))
        if storage.list_uris(self.spool_uri):
            raise FileExistsError(
                f"Attempt {spec.attempt} has reported before, to {self.spool_uri}; start another one."
            )
        self._run_uri, self._attempt = spec.run_uri, spec.attempt
        self._events_url = spec.events_url
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._period_seconds = period_seconds
        self._next_seq = 0
        self._pending: deque[tuple[int, bytes]] = deque()  # seq and event; reported, not yet in the spool
        self._segment: tuple[str, bytes] | None = None  # being written; kept unchanged until that succeeds
        self._unshipped: deque[str] = deque()  # segments' URIs
        self._fenced = False
        self._ended = False
        self._closing = threading.Event()
        self._changed = threading.Condition()  # guards all of the above but _segment
        self._writing = threading.Lock()  # guards _segment
        for work in (self._spool_periodically, self._ship):
            threading.Thread(target=work, daemon=True).start()

    def report(self, report: Report) -> None:
        with self._changed:
            if self._ended:
                return  # workers go on for a moment after what ends the attempt
            self._ended = isinstance(report, Succeeded | Failed)
            event = JobEvent(seq=self._next_seq, created_at=time.time(), report=report)
            # Encoded here: text that is no Unicode fails its reporter, and leaves no gap in the numbers.
            self._pending.append((self._next_seq, event.model_dump_json().encode()))
            self._next_seq += 1

    def fenced(self) -> bool:
        """A later attempt has taken the job over: this one must stop."""
        return self._fenced

    def flush(self) -> None:
        """Returns when all that was reported so far stands in the spool."""
        with self._writing:
            while self._segment or self._pending:
                self._segment = self._segment or self._next_segment()
                uri, body = self._segment
                storage.write_bytes(uri, body)
                self._segment = None
                with self._changed:
                    self._unshipped.append(uri)
                    self._changed.notify_all()

    def close(self, timeout_seconds: float) -> bool:
        """Spools what is left and gives the shipper so much time for the rest. True if all arrived."""
        self.flush()
        with self._changed:
            self._changed.wait_for(lambda: self._fenced or not self._unshipped, timeout_seconds)
            self._closing.set()
            self._changed.notify_all()
            return not self._unshipped

    def _next_segment(self) -> tuple[str, bytes]:
        with self._changed:
            events = [self._pending.popleft() for _ in range(min(len(self._pending), EVENTS_PER_SEGMENT))]
        uri = segment_uri(self._run_uri, self._attempt, events[0][0])
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
            while uri := self._next_unshipped():
                if self._post(client, uri):
                    pause = FIRST_RETRY_SECONDS
                    with self._changed:
                        self._unshipped.popleft()
                        self._changed.notify_all()
                else:
                    self._closing.wait(pause)
                    pause = min(2 * pause, LAST_RETRY_SECONDS)

    def _next_unshipped(self) -> str | None:
        """Waits for a segment. None ends the shipping: closed, or fenced."""
        with self._changed:
            self._changed.wait_for(lambda: self._unshipped or self._closing.is_set() or self._fenced)
            return None if self._closing.is_set() or self._fenced else self._unshipped[0]

    def _post(self, client: httpx.Client, uri: str) -> bool:
        """Whether the control plane has the segment now. It knows a segment that it saw before by its numbers."""
        try:
            answer = client.post(self._events_url, content=storage.read_bytes(uri))
        except (httpx.HTTPError, OSError) as error:
            logger.warning("%s was not shipped: %r", uri, error)
            return False
        if answer.status_code == httpx.codes.CONFLICT:
            with self._changed:
                self._fenced = True
                self._changed.notify_all()
        elif not answer.is_success:
            logger.warning("%s was not accepted: %d %s", uri, answer.status_code, answer.text[:200])
        return answer.is_success

"""Sends the reports of an attempt (one run of a job): numbers them, stores them, and posts them to the control plane.

A report is a message such as metrics or a saved checkpoint. All reports are stored; the reports in storage are called
the spool. Posts only make reports arrive sooner, so training never waits for the control plane. Each answer of the
control plane to a post has the state that the user wants for the job (run, pause or cancel). If there is nothing to
post, an empty post every few seconds asks for this state.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import httpx
import ray

from services import spool, storage, tracing
from services.contract import (
    OWN_TOKEN_HEADER,
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
from services.training.reports.stages import StageSpans

logger = logging.getLogger(__name__)

EVENTS_PER_SEGMENT = 500
BYTES_PER_SEGMENT = 2**18  # plus one event: the control plane refuses every post above `max_json_bytes`
POST_TIMEOUT_SECONDS = 10.0
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.5, 15.0
HEARTBEAT_SECONDS = 3.0  # between two posts
UNHEARD_SECONDS = 60.0  # time without an answer, after which the heartbeat goes to the spool
WORKER_SECONDS = 10.0  # time without a worker's call, after which no workers are assumed
DRIVER_SECONDS = 60.0  # time without a driver's call, after which no heartbeat is sent
SENTENCE_SECONDS = 60.0  # between two messages about one stage

HEARTBEAT = b'{"events":[]}'
WATCH = "watch"  # concurrency group of the actor, so that asking for a command does not wait for a slow spool
Command = Literal[Desired, "fenced"]
"""What an attempt (one run of a job) should do: run, pause or cancel, as the user wants. `fenced` means that a later
attempt has taken the job over, so that this one must stop."""


class JobFailed(Exception):
    """Raised if a job fails for a reason that only the user can fix. Another attempt (run of the job) would fail in the
    same way."""

    def __init__(self, report: Failed) -> None:
        super().__init__(report)  # pickle calls this method with it in another process
        self.report = report

    def __str__(self) -> str:
        return self.report.message


def invalid_file(message: str) -> Failed:
    """Returns the report `Failed` for a training file that cannot be used. `message` is the reason, for the user."""
    return Failed(code="invalid_training_file", message=message, param="training_file")


def progress(report: Callable[[Report], None], stage: Stage, total: int, *, start: int = 0) -> Callable[[int], None]:
    """Returns a function that reports the progress of a stage, such as encoding. The caller calls this function with
    the number of items that are done, out of `total`.

    The function sends at most one report a second, and one when all items are done. The first report is sent
    immediately, with `start`, the number of items that were done before. Once a minute, a message to the user estimates
    the remaining time from the speed so far.
    """
    began = last_message = time.monotonic()
    last = float("-inf")

    def done(number: int) -> None:
        nonlocal last, last_message
        now = time.monotonic()
        if number == total or now - last >= 1:
            last = now
            report(Progress(stage=stage, done=number, total=total))
        if now - last_message >= SENTENCE_SECONDS and start < number < total:
            last_message = now
            minutes = (now - began) / (number - start) * (total - number) / 60
            share = f"{number} of {total} ({number / total:.0%})"
            report(Message(message=f"{stage.capitalize()}: {share} done, about {minutes:.0f} minutes left."))

    done(start)
    return done


class Reporter:
    """Numbers the reports of one attempt (one run of a job), stores them, and posts them to the control plane. Each
    attempt has one Reporter, which runs as a Ray actor."""

    def __init__(self, spec: AttemptAddress, token: str, *, period_seconds: float = 1.0) -> None:
        self.spool_uri = spool.folder(spec.run_uri, spec.attempt)
        if storage.list_uris(self.spool_uri):
            raise FileExistsError(
                f"Attempt {spec.attempt} was started before and has reports in {self.spool_uri}; start a new attempt."
            )
        self._run_uri, self._attempt = spec.run_uri, spec.attempt
        self._events_url = spec.events_url
        # Ray shows the launch's token to everyone who lists Ray's jobs. So it is exchanged for a secret token.
        own_token = secrets.token_urlsafe(32)
        self._exchange: dict[str, str] | None = {"Authorization": f"Bearer {token}", OWN_TOKEN_HEADER: own_token}
        self._headers = {"Authorization": f"Bearer {own_token}"}
        self._period_seconds = period_seconds
        self._next_seq = 0
        self._spans = StageSpans(spec.traceparent)
        self._pending: deque[tuple[int, bytes]] = deque()  # seq and event of reports that are not in the spool yet
        self._segment: tuple[str, bytes] | None = None  # URI and body of the segment that is being written
        self._unposted: deque[str] = deque()  # URIs of segments that are not posted yet
        self._ended = False
        self._command: Command = "run"  # from the control plane's last answer
        self._pausing = False
        self._answered_at = self._driver_at = time.monotonic()
        self._worker_at = float("-inf")
        self._closing = threading.Event()
        self._changed = threading.Condition()  # guards all attributes above except _segment
        self._writing = threading.Lock()  # guards _segment
        for work in (self._spool_periodically, self._post_periodically):
            threading.Thread(target=work, daemon=True).start()

    def report(self, report: Report) -> None:
        with self._changed:
            if self._ended:
                return  # workers still report for a moment after the attempt's last report
            self._ended = isinstance(report, Succeeded | Failed | Paused | Died)
            event = JobEvent(seq=self._next_seq, created_at=time.time(), report=report)
            # The event is encoded here, so that invalid Unicode fails the caller and leaves no gap in the numbers.
            self._pending.append((self._next_seq, event.model_dump_json().encode()))
            self._next_seq += 1
            self._spans.add(report, event.created_at)

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def command(self) -> Command:
        """Returns the current command for the training workers, such as run or pause. Also records that a worker has
        asked for the command."""
        self._worker_at = time.monotonic()
        return self._command_now()

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def beat(self) -> tuple[Command, bool]:
        """Records that the driver (the job's main program) is alive. Returns two values:

        - the driver's current command, such as run or pause
        - whether a training worker has asked for its command in the last WORKER_SECONDS
        """
        now = self._driver_at = time.monotonic()
        return self._command_now(), now - self._worker_at < WORKER_SECONDS

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def pause(self) -> None:
        """Tells the training workers to pause: from now on their command is "pause", even if the control plane answers
        "run"."""
        self._pausing = True

    def _command_now(self) -> Command:
        return "pause" if self._pausing and self._command == "run" else self._command

    def flush(self) -> None:
        """Writes all reports so far to storage, and returns when they are written."""
        with self._writing:
            while self._segment or self._pending:
                self._segment = self._segment or self._next_segment()
                uri, body = self._segment
                spool.write(uri, body)
                self._segment = None
                with self._changed:
                    self._unposted.append(uri)
                    self._changed.notify_all()

    def close(self, timeout_seconds: float) -> bool:
        """Writes the remaining reports to storage, and waits up to `timeout_seconds` until all reports are posted.

        Returns whether all reports were posted.
        """
        self.flush()
        with self._changed:
            self._spans.end()
            self._changed.wait_for(lambda: self._command == "fenced" or not self._unposted, timeout_seconds)
            self._closing.set()
            self._changed.notify_all()
            arrived = not self._unposted
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
        """Writes the reports to storage every second. If storage fails, tries again without end, because no report may
        be lost; the pauses between tries grow to LAST_RETRY_SECONDS. If storage failed for long, tells the user
        afterwards how long.
        """
        pause, failures, failing_since = self._period_seconds, 0, 0.0
        while not self._closing.wait(pause):
            try:
                self.flush()
            except OSError as error:
                failing_since, failures = failing_since if failures else time.monotonic(), failures + 1
                pause = min(2 * pause, LAST_RETRY_SECONDS)
                if failures.bit_count() == 1:  # the 1st, 2nd, 4th, 8th and so on in a row
                    what = "The reports could not be written to %s in storage; this is tried again (failure %d): %s"
                    logger.warning(what, self.spool_uri, failures, error)
                continue
            if failures and (seconds := time.monotonic() - failing_since) > SENTENCE_SECONDS:
                late = f"The storage took no reports for {seconds:.0f} seconds, so they arrive late; none is lost."
                self.report(Message(level="warn", message=late))
            pause, failures = self._period_seconds, 0

    def _post_periodically(self) -> None:
        pause = FIRST_RETRY_SECONDS
        with httpx.Client(timeout=POST_TIMEOUT_SECONDS, headers={"Content-Type": "application/json"}) as client:
            while self._command != "fenced":
                uri = self._next_unposted()
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

    def _next_unposted(self) -> str | None:
        """Waits up to HEARTBEAT_SECONDS for a file of reports in storage that is not posted yet, and returns its URI.

        Returns None if no such file has come in this time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._unposted or self._closing.is_set(), HEARTBEAT_SECONDS)
            return self._unposted[0] if self._unposted else None

    def _post(self, client: httpx.Client, uri: str | None) -> bool:
        """Posts the file of reports at `uri` to the control plane, or a heartbeat if `uri` is None.

        Returns False if the post must be tried again. Posting a file twice does no harm, because the control plane
        recognizes reports by their numbers. The command in the control plane's answer becomes the command of this
        attempt (one run of the job).
        """
        try:
            answer = self._send(client, spool.read_body(uri) if uri else HEARTBEAT)
            if answer.status_code == httpx.codes.CONFLICT:
                command: Command = "fenced"
            else:
                command = Wish.model_validate_json(answer.raise_for_status().content).desired
        except DamagedSegment as error:
            logger.error(
                "A file of stored reports is damaged; "
                "the control plane adds an event about the loss when it reads the file: %s",
                error,
            )
            with self._changed:
                self._unposted.popleft()
                self._changed.notify_all()
            return True
        except (httpx.HTTPError, OSError, ValueError) as error:
            logger.warning("%s could not be sent to the control plane: %r", uri or "A heartbeat", error)
            return False
        with self._changed:
            self._command, self._answered_at = command, time.monotonic()
            if uri and command != "fenced":
                self._unposted.popleft()
            self._changed.notify_all()
        return True

    def _send(self, client: httpx.Client, body: bytes) -> httpx.Response:
        """Posts `body` to the control plane and returns the response.

        The attempt (one run of a job) was launched with a token that others can see. Posts with this launch token also
        offer the control plane a new token that only the attempt knows. A refusal of such a post means that the control
        plane has accepted the new token already, at an earlier post whose answer was lost. From then on, posts use the
        new token.
        """
        if self._exchange is not None:
            answer = client.post(self._events_url, content=body, headers=self._exchange)
            if answer.status_code != httpx.codes.CONFLICT:
                return answer
            self._exchange = None
        return client.post(self._events_url, content=body, headers=self._headers)

    def _beat_in_spool(self) -> None:
        """If posts had no answer for UNHEARD_SECONDS, writes a heartbeat (a sign that this run of the job is alive) to
        storage, where the control plane finds it."""
        if time.monotonic() - self._answered_at > UNHEARD_SECONDS:
            self._answered_at = time.monotonic()
            self.report(Alive())

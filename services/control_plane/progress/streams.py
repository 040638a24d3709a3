"""Sends the events of jobs to clients as streams. New events of a job are read once for all open streams of the job.

Triggers in the database send a notification of each change. A stream holds no database connection; it stores only its
position, which is the id of the last event that it sent. Later events come from the newest events in memory or, if the
stream is further behind, from the table. So a slow stream delays no other stream, and loses no event.
"""

import asyncio
import json
import logging
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from services.control_plane.core.log_setup import Trouble
from services.control_plane.core.store import Store
from services.control_plane.core.tables import TERMINAL, Job
from services.control_plane.core.telemetry import OPEN_STREAMS, STREAM_TABLE_READS
from services.control_plane.jobs.checkpoint_evaluations import checkpoint_evaluations
from services.control_plane.jobs.events.events import newest_events, next_events
from services.control_plane.jobs.responses import event_object, job_object
from services.control_plane.settings import Settings

log = logging.getLogger(__name__)

KEPT = 200  # the most events of a watched job in memory
PAGE = 500  # events that a stream reads from the table in one statement
READERS = 4  # streams that read from the table at a time
JOBS_AT_ONCE = 500  # jobs that are read in one transaction
MERGE_SECONDS = 0.05  # changes of a job within this time are sent together
KEEPALIVE_SECONDS = 15.0
LONGEST_SECONDS = 3600.0  # a stream ends after this long; the client reconnects, with a key that is still valid
QUIET_SECONDS = 30.0  # after this long without a notification, all jobs with open streams are read
DEAF_SECONDS = 2.0  # how often jobs with open streams are read while the database cannot send notifications

WOKEN_AT_ONCE = 200  # streams that go on without a pause; then other tasks of the process run

KEEPALIVE = b": keepalive\n\n"


class News:
    """Wakes the open event streams of a job when the job has changed, a limited number of streams at a time."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    async def wait(self) -> None:
        """Waits until a call of `tell` announces that the job has changed."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)

    async def tell(self) -> None:
        """Announces that the job has changed: wakes all streams that wait, so that they send what is new."""
        for number, future in enumerate(list(self._waiting), start=1):
            if not future.done():
                future.set_result(None)
            if number % WOKEN_AT_ONCE == 0:
                await asyncio.sleep(0)


class Watched:
    """A job that clients follow: its newest events, its status, and the number of its open streams."""

    def __init__(self) -> None:
        self.frames: deque[tuple[int, bytes]] = deque()
        self.before = self.last = 0  # all events after `before`, up to `last`, are in `frames`
        self.seen: Any = None  # the version and progress that `state` shows
        self.state = b""  # the frame with the job's status and progress
        self.end: bytes | None = None  # the last frames of every stream, once the job has ended
        self.news = News()
        self.num_streams = 0

    def add(self, events: list[tuple[int, bytes]]) -> None:
        """Adds new events of the job to those in memory, and drops the oldest if there are more than KEPT.

        `events` are pairs of an event's id and its bytes in a stream. No event may be missing between the last event in
        memory and these events. But if there are more than KEPT of these events, events before them may be missing,
        because these events then replace all events in memory.
        """
        if len(events) > KEPT:
            self.frames.clear()
        for event in events:
            if len(self.frames) == KEPT:
                self.before = self.frames.popleft()[0]
            self.frames.append(event)
        if len(events) > KEPT:
            self.before = events[0][0]
        self.last = self.frames[-1][0] if self.frames else self.last

    def after(self, place: int) -> bytes:
        """Returns the bytes to send to a stream for all events in memory whose ids are greater than `place`."""
        newer = []
        for number, frame in reversed(self.frames):
            if number <= place:
                break
            newer.append(frame)
        return b"".join(reversed(newer))


class Streams:
    """Serves the event streams of all jobs. Every control plane has one object of this class."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._watched: dict[str, Watched] = {}
        self._changed: set[str] = set()
        self._woken = asyncio.Event()
        self._reading = asyncio.Semaphore(READERS)
        self._closed = False
        self._listening, self._looking = Trouble(log, "Streams"), Trouble(log, "Streams")

    async def close(self) -> None:
        """Ends every open event stream of this control plane. The clients then reconnect, and reach another control
        plane.
        """
        self._closed = True
        for watched in list(self._watched.values()):
            await watched.news.tell()

    async def run(self) -> None:
        """Listens for notifications of the database, and reads the events of changed jobs that clients follow, until
        cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._look())

    async def _listen(self) -> None:
        """Listens for notifications, which name changed jobs, and passes these on to `_look`, until cancelled."""
        while True:
            try:
                async with aclosing(self._store.listen("jobs", quiet_seconds=QUIET_SECONDS)) as notices:
                    async for job_id in notices:
                        self._listening.passed()
                        self._wake(self._watched if job_id is None else self._watched.keys() & {job_id})
            except Exception as error:  # nobody watches this task, so it goes on after any error
                self._listening.failed(
                    "The database sends no notifications, so jobs that clients follow are read every few seconds: %s",
                    error,
                )
            await asyncio.sleep(DEAF_SECONDS)
            self._wake(self._watched)

    def _wake(self, job_ids: Iterable[str]) -> None:
        self._changed.update(job_ids)
        if self._changed:
            self._woken.set()

    async def _look(self) -> None:
        """Reads the events of changed jobs that clients follow, until cancelled."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            changed, self._changed = list(self._changed), set()
            try:
                for start in range(0, len(changed), JOBS_AT_ONCE):
                    await self._look_at(changed[start : start + JOBS_AT_ONCE])
                self._looking.passed()
            except Exception as error:
                message = "The events of jobs that clients follow could not be read and are tried again: %s"
                self._looking.failed(message, error)
                self._wake(changed)
                await asyncio.sleep(DEAF_SECONDS)
            await asyncio.sleep(MERGE_SECONDS)

    async def _look_at(self, job_ids: Iterable[str]) -> None:
        """Reads the new events and the state of these jobs from the database, and lets the open streams of the jobs
        send them."""
        # `looked` keeps the Watched objects, not the ids: during the read, a job's last stream may leave and another
        # stream join. The other stream has a new Watched object, which is read next.
        looked = {job_id: self._watched[job_id] for job_id in job_ids if job_id in self._watched}
        places = {job_id: watched.last for job_id, watched in looked.items()}
        async with self._store.snapshot() as session:  # one moment: no event comes or moves between the statements
            rows = list(await session.scalars(select(Job).where(Job.id.in_(places))))
            events: dict[str, list[tuple[int, bytes]]] = {job_id: [] for job_id in places}
            for event in await newest_events(session, places, limit=KEPT + 1):
                events[event.job_id].append(_frame(event))
            evaluations = await checkpoint_evaluations.of_jobs(session, rows)
        for row in rows:
            watched = looked[row.id]
            watched.add(events[row.id])
            try:
                self._show(watched, row, evaluations.get(row.id, ()))
            except Exception:  # an error with one job must not stop the streams of others
                log.exception("The state of job %s could not be sent to the clients that follow it", row.id)
            await watched.news.tell()

    def _show(self, watched: Watched, row: Job, evaluations: Sequence[dict[str, Any]]) -> None:
        seen = (row.version, row.waits_for, row.progress)
        if seen == watched.seen:
            return
        job = job_object(row, self._settings, evaluations)
        state = {
            "object": "fine_tuning.job.progress",
            "status": row.observed,
            "waits_for": row.waits_for,
            "progress": job["x_raydpo"]["progress"],
            "estimated_finish": job["estimated_finish"],
        }
        watched.seen, watched.state = seen, _data(state)
        if row.observed in TERMINAL:
            watched.end = _data(job) + b"data: [DONE]\n\n"

    async def follow(self, job_id: str, place: int) -> AsyncGenerator[bytes]:
        """Yields the bytes of a stream of server-sent events: the job's events after the event id `place`, until the
        job ends.

        If nothing happened for a while, yields KEEPALIVE, a comment that keeps the connection open. The stream may end
        early; the client then resumes after the last event that it received.
        """
        watched, shown = self._join(job_id), b""
        until = time.monotonic() + LONGEST_SECONDS
        try:
            yield b"retry: %d\n\n" % random.randint(1_000, 10_000)  # random, or all clients would reconnect at once
            while not self._closed and time.monotonic() < until:
                if place < watched.before:
                    place, frames = await self._read(job_id, place)
                    yield frames
                    continue
                frames, place = watched.after(place), max(place, watched.last)
                if watched.state is not shown:
                    frames, shown = frames + watched.state, watched.state
                if watched.end:
                    yield frames + watched.end
                    return
                if frames := frames or await _news(watched):
                    yield frames
        except (SQLAlchemyError, OSError) as error:
            log.warning("A stream of events ended early; the client reconnects and resumes it: %s", error)
        finally:
            self._leave(job_id, watched)

    async def _read(self, job_id: str, place: int) -> tuple[int, bytes]:
        """Reads events of the job after the event with the id `place` from the table.

        Returns the id of the last event that was read, and the events as bytes for the stream.
        """
        async with self._reading, self._store.snapshot() as session:
            events = await next_events(session, job_id, place, limit=PAGE)
        STREAM_TABLE_READS.inc()
        return events[-1].id, b"".join(_frame(event)[1] for event in events)

    def _join(self, job_id: str) -> Watched:
        watched = self._watched.setdefault(job_id, Watched())
        if not watched.num_streams:
            self._wake([job_id])
        watched.num_streams += 1
        OPEN_STREAMS.inc()
        return watched

    def _leave(self, job_id: str, watched: Watched) -> None:
        watched.num_streams -= 1
        OPEN_STREAMS.dec()
        if not watched.num_streams:
            del self._watched[job_id]


async def _news(watched: Watched) -> bytes:
    """Waits until the job `watched` changes, and returns b"".

    If the job does not change for KEEPALIVE_SECONDS, returns KEEPALIVE, a comment that keeps the connection open.
    """
    try:
        async with asyncio.timeout(KEEPALIVE_SECONDS):
            await watched.news.wait()
    except TimeoutError:
        return KEEPALIVE
    return b""


def _frame(event: Any) -> tuple[int, bytes]:
    return event.id, b"id: " + event.public_id.encode() + b"\n" + _data(event_object(event))


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"

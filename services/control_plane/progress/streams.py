"""Live views of jobs. What happens to a watched job is read once, and every open stream is handed it.

The database notifies of each change (triggers see to it). A stream keeps nothing but its place, and holds no database
connection: it takes what follows its place from the newest events in memory, or, where it is further behind, from the
table. So a slow stream delays nobody, and loses nothing.
"""

import asyncio
import json
import logging
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from services.control_plane.core.store import Store, newest_events, next_events
from services.control_plane.core.tables import TERMINAL, Job
from services.control_plane.core.telemetry import OPEN_STREAMS, STREAM_TABLE_READS
from services.control_plane.jobs.responses import event_object, job_object
from services.control_plane.settings import Settings

log = logging.getLogger(__name__)

KEPT = 200  # events of a watched job in memory
PAGE = 500  # events that are read from the table at once, by so many streams at a time:
READERS = 4
JOBS_AT_ONCE = 500
MERGE_SECONDS = 0.05  # changes of so long are told together
KEEPALIVE_SECONDS = 15.0
LONGEST_SECONDS = 3600.0  # then the client comes again, with a key that still holds
QUIET_SECONDS = 30.0  # so long nothing is notified before all watched jobs are looked at
DEAF_SECONDS = 2.0  # between two looks while the database cannot be listened to

WOKEN_AT_ONCE = 200  # streams; what else is asked of this process is served in between

KEEPALIVE = b": keepalive\n\n"


class News:
    """What waits is woken, a few at a time."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    async def wait(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)

    async def tell(self) -> None:
        for number, future in enumerate(list(self._waiting), start=1):
            if not future.done():
                future.set_result(None)
            if number % WOKEN_AT_ONCE == 0:
                await asyncio.sleep(0)


class Watched:
    """A job that somebody watches: its newest events, and where it is."""

    def __init__(self) -> None:
        self.frames: deque[tuple[int, bytes]] = deque()
        self.before = self.last = 0  # all events after `before`, up to `last`, are in `frames`
        self.seen: Any = None  # what `state` tells of
        self.state = b""  # the frame that says where the job is
        self.end: bytes | None = None  # the last frames, once the job is terminal
        self.news = News()
        self.num_streams = 0

    def add(self, events: list[tuple[int, bytes]]) -> None:
        """The newest KEPT + 1 that follow `last`, or fewer if there are no more."""
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
        behind = []
        for number, frame in reversed(self.frames):
            if number <= place:
                break
            behind.append(frame)
        return b"".join(reversed(behind))


class Streams:
    """One in every control plane."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._watched: dict[str, Watched] = {}
        self._changed: set[str] = set()
        self._woken = asyncio.Event()
        self._reading = asyncio.Semaphore(READERS)
        self._closed = False

    async def close(self) -> None:
        """End every stream where it is; its client resumes elsewhere."""
        self._closed = True
        for watched in list(self._watched.values()):
            await watched.news.tell()

    async def run(self) -> None:
        """Listen and look until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._look())

    async def _listen(self) -> None:
        while True:
            try:
                async with aclosing(self._store.listen("jobs", quiet_seconds=QUIET_SECONDS)) as notices:
                    async for job_id in notices:
                        self._wake(self._watched if job_id is None else self._watched.keys() & {job_id})
            except Exception as error:  # nobody watches this task: whatever it was, it is tried again
                log.warning("The database cannot be listened to; watched jobs are looked at by turns: %s", error)
            await asyncio.sleep(DEAF_SECONDS)
            self._wake(self._watched)

    def _wake(self, job_ids: Iterable[str]) -> None:
        self._changed.update(job_ids)
        if self._changed:
            self._woken.set()

    async def _look(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            changed, self._changed = list(self._changed), set()
            try:
                for start in range(0, len(changed), JOBS_AT_ONCE):
                    await self._look_at(changed[start : start + JOBS_AT_ONCE])
            except Exception as error:
                log.warning("Watched jobs could not be read, which is tried again: %s", error)
                self._wake(changed)
                await asyncio.sleep(DEAF_SECONDS)
            await asyncio.sleep(MERGE_SECONDS)

    async def _look_at(self, job_ids: Iterable[str]) -> None:
        # Their objects and not their ids: while this reads, a job's last stream may leave and another one join, whose
        # object begins anew and is looked at next.
        looked = {job_id: self._watched[job_id] for job_id in job_ids if job_id in self._watched}
        places = {job_id: watched.last for job_id, watched in looked.items()}
        async with self._store.begin() as session:
            # Before their events: none can follow a terminal state.
            rows = list(await session.scalars(select(Job).where(Job.id.in_(places))))
            events: dict[str, list[tuple[int, bytes]]] = {job_id: [] for job_id in places}
            for event in await newest_events(session, places, limit=KEPT + 1):
                events[event.job_id].append(_frame(event))
        for row in rows:
            watched = looked[row.id]
            watched.add(events[row.id])
            self._show(watched, row)
            await watched.news.tell()

    def _show(self, watched: Watched, row: Job) -> None:
        seen = (row.version, row.waits_for, row.progress)
        if seen == watched.seen:
            return
        job = job_object(row, self._settings)
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
        """The frames of a stream of the job's events after the one with the id `place`, until it is terminal.

        KEEPALIVE where nothing happened for a while. They may end early: the client resumes from the last event.
        """
        watched, shown = self._join(job_id), b""
        until = time.monotonic() + LONGEST_SECONDS
        try:
            yield b"retry: %d\n\n" % random.randint(1_000, 10_000)  # after a restart not all come at once
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
            log.warning("A stream ends, for its client to resume: %s", error)
        finally:
            self._leave(job_id, watched)

    async def _read(self, job_id: str, place: int) -> tuple[int, bytes]:
        """What follows `place` in the table, and where that ends."""
        async with self._reading, self._store.begin() as session:
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
    """Nothing when there is something new, KEEPALIVE when there is not."""
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

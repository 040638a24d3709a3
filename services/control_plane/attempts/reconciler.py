"""Compares what is wanted with what is observed, and acts. Level-triggered: a missed tick loses nothing.

Unknown is never failed: without Ray's own word on an attempt, nothing changes.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

import httpx
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.attempts.decision import (
    HUNG_SECONDS,
    Decision,
    Past,
    Stopwatches,
    decide,
    leaves_slot,
    pause_seconds,
    rest_seconds,
)
from services.control_plane.attempts.executor import Executor
from services.control_plane.attempts.patience import TOLD_AFTER, TRIES, Patience, in_words, is_ours
from services.control_plane.attempts.scheduling import FOR_MODELS, needs, what_each_waits_for
from services.control_plane.cleanup import Sweeper
from services.control_plane.core import log_setup, store, telemetry
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Attempt, Job
from services.control_plane.jobs import jobs
from services.control_plane.models import deployments, places
from services.control_plane.ray_api import UNKNOWN, AttemptStatus, Launcher, ServeView, Submission
from services.control_plane.settings import Settings
from services.control_plane.tenants import quotas

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
LEASE_SECONDS = 10.0
MODELS = "models"  # under this name Patience counts failures to load models
AT_ONCE = 8  # jobs: what is slow for one keeps the others, and the lease, less than the sum of all
UNREACHABLE = "the Ray cluster to answer"
QUIET_SECONDS = 10.0  # after so long without a report, the spool is read where it lies


class Reconciler:
    """One runs in every control plane; the holder of the lease acts."""

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        settings: Settings,
        *,
        holder: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._launcher, self._settings = store, launcher, settings
        self._holder = holder  # this control plane's name in the lease
        self._leads = False
        self._clock, self._job_began = clock, float("-inf")  # when a job began last, as far as was seen here
        self._patience = Patience(clock)
        self._stopwatches = Stopwatches(gap_seconds=LEASE_SECONDS, clock=clock)
        self._executor = Executor(store, launcher, settings, holder=holder)
        self._sweeper = Sweeper(store, launcher, settings)
        self._sweeping: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Tick until cancelled; then hand the lease back."""
        try:
            while True:
                try:
                    with telemetry.TICK_SECONDS.time():
                        await self.tick()
                except (SQLAlchemyError, httpx.HTTPError, OSError) as error:
                    telemetry.TICKS.labels("failed").inc()
                    log.warning("A tick failed and is tried again: %s", error)
                except Exception:
                    telemetry.TICKS.labels("failed").inc()
                    log.exception("A tick failed, by a fault of ours, and is tried again")
                if self._leads:
                    self._sweep()
                await asyncio.sleep(TICK_SECONDS)
        finally:
            if self._sweeping is not None:
                self._sweeping.cancel()
                await asyncio.wait({self._sweeping})
            with suppress(SQLAlchemyError, OSError):
                await self.release()

    async def release(self) -> None:
        """Hand the lease back, so that another need not wait for its end."""
        async with self._store.begin() as session:
            await store.release_lease(session, "reconciler", self._holder)

    async def tick(self) -> None:
        async with self._store.begin() as session:
            self._leads = await store.hold_lease(session, "reconciler", self._holder, seconds=LEASE_SECONDS)
            if not self._leads:
                telemetry.TICKS.labels("stood_by").inc()
                return
            self._stopwatches.look()
            live, opened = await store.live_jobs(session), await store.open_attempts(session)
            resting, back = await _without_slots(session, live, opened)
            shares, out_of_hours = await quotas.shares(session), await quotas.out_of_hours(session)
        asked = [attempt.submission_id for attempt in opened.values()]
        view, told, capacity = await asyncio.gather(
            self._look(), self._launcher.submissions(asked), self._capacity(live, back)
        )
        spent = {job.id: out_of_hours[job.project_id] for job in live if job.project_id in out_of_hours}
        holders = {job.id for job in live if job.observed == "running"} - resting - back
        contenders = [job for job in live if job.id in holders or job.id not in spent.keys() | resting]
        engines = await self._engines(view, [job for job in live if job.id in holders], capacity)
        waits = spent | (
            what_each_waits_for(contenders, shares, capacity, self._settings, back, engines)
            if view is not None
            else dict.fromkeys((job.id for job in live), UNREACHABLE)
        )
        turns = asyncio.Semaphore(AT_ONCE)

        async def look_at(job: Job) -> None:
            async with turns:
                await self._look_at(job, opened.get(job.id), waits.get(job.id), told)

        await asyncio.gather(*map(look_at, live))
        if view is None:
            raise httpx.HTTPError("the Ray cluster does not answer")
        running = [job for job in contenders if waits.get(job.id) is None]
        if any(job.id not in holders for job in running):
            self._job_began = self._clock()
        next_job = [job for job in contenders if waits.get(job.id) == FOR_MODELS]
        await self._serve_models(view, self._room(running, next_job, capacity))
        telemetry.TICKS.labels("acted").inc()

    async def _look_at(
        self, job: Job, attempt: Attempt | None, waits_for: str | None, told: Mapping[str, Submission]
    ) -> None:
        """One job's trouble is not the others': it is looked at again later."""
        if not self._patience.is_due(job.id, job.version):
            return
        try:
            if waits_for and job.observed == "queued":
                await self._wait(job, waits_for)
                return
            submission = told[attempt.submission_id] if attempt else UNKNOWN
            with log_setup.about(job_id=job.id, attempt=attempt.number if attempt else None):
                await self._reconcile(job, attempt, submission, waits_for)
            self._patience.forget(job.id)
        except jobs.Stale as error:
            log.warning("Job %s is left as it is for now: %s", job.id, error)
        except Exception as error:
            await self._put_off(job, attempt, error)

    async def _put_off(self, job: Job, attempt: Attempt | None, error: Exception) -> None:
        """The job is tried again later: without end while the world around is down, else a limited number of times."""
        tries, ours = self._patience.fail(job.id, job.version), is_ours(error)
        log.warning("Job %s is left as it is for now (%d tries): %r", job.id, tries, error, exc_info=ours)
        try:
            if ours and tries >= TRIES:
                await self._executor.abandon(job, attempt, in_words(error), tries)
            elif tries == TOLD_AFTER:
                async with self._store.begin() as session:
                    message = f"The job's next step fails and is tried again: {in_words(error)}"
                    jobs.tell(session, job.id, message, level="warn")
        except Exception as trouble:  # the others come first; it is told at the next try
            log.warning("Job %s could not be told of it: %r", job.id, trouble)

    def _sweep(self) -> None:
        """Beside the ticks: it lists and deletes in storage, which may take longer than a lease."""
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(self._sweeper.sweep())

    async def _look(self) -> ServeView | None:
        """None while Ray does not answer. Nothing is launched then: what may run there cannot be cancelled either."""
        try:
            return await self._launcher.look()
        except httpx.HTTPError:
            return None

    async def _capacity(self, live: Sequence[Job], back: Collection[str]) -> dict[str, float]:
        """Of the cluster, where a job waits for its turn, or models need GPUs."""
        waits = back or self._settings.num_gpus_per_model or any(job.observed == "queued" for job in live)
        return await self._launcher.capacity() if waits else {}

    async def _wait(self, job: Job, what: str) -> None:
        if job.waits_for != what:
            async with self._store.begin() as session:
                await jobs.wait_for(session, job, what)

    async def _reconcile(
        self, job: Job, attempt: Attempt | None, submission: Submission, waits_for: str | None
    ) -> None:
        """One decision for one job, carried out. `submission` is Ray's word on the attempt."""
        status = submission.status
        if attempt is not None and status == "running" and attempt.silent_seconds > QUIET_SECONDS:
            attempt = await self._executor.collect(job, attempt)
        async with self._store.begin() as session:
            history = await store.history(session, job.id)
        past = Past(
            slot=waits_for is None,
            failures=history.failures,
            limit=self._settings.max_attempts,
            rested_seconds=history.rested_seconds,
            hung=self._hung(attempt, status),
            overdue=self._stopwatches.seconds(f"{job.id} pauses", job.desired == "pause") > pause_seconds(job),
        )
        decision = decide(job, attempt, status, past, collected=False)
        if decision is Decision.COLLECT and attempt is not None:
            attempt = await self._executor.collect(job, attempt)
            decision = decide(job, attempt, status, past, collected=True)
        if decision is Decision.QUEUE and waits_for is not None:
            await self._wait(job, waits_for)
            return
        if decision is not Decision.WAIT:
            log.info("Job %s: %s", job.id, decision.name.lower())
        await self._executor.carry_out(decision, job, attempt, history, submission)

    def _hung(self, attempt: Attempt | None, status: AttemptStatus) -> bool:
        """Silence counts from when Ray first said, to this control plane, that the attempt runs."""
        if attempt is None:
            return False
        holds = None if status == "unknown" else status == "running"
        running = self._stopwatches.seconds(f"{attempt.submission_id} runs", holds)
        return min(running, attempt.silent_seconds) > HUNG_SECONDS

    async def _engines(
        self, view: ServeView | None, running: Sequence[Job], capacity: Mapping[str, float]
    ) -> places.Engines:
        """What loaded models, and those that wait, mean to the next jobs."""
        if view is None or not self._settings.num_gpus_per_model:
            return places.NO_ENGINES
        async with self._store.begin() as session:
            wished = await deployments.wishes(session, view.applications)
        stopping = {name for name, app in view.applications.items() if app.state == "stopping" or name not in wished}
        return places.engines(
            wished.values(),
            len(stopping),
            self._room(running, [], capacity),
            capacity=capacity.get("GPU", 0.0),
            since_last_job=self._clock() - self._job_began,
        )

    def _room(self, running: Sequence[Job], next_job: Sequence[Job], capacity: Mapping[str, float]) -> places.Room:
        """What jobs leave to models."""

        def gpus(jobs: Sequence[Job]) -> float:
            return sum(needs(job, self._settings).get("GPU", 0.0) for job in jobs)

        settings = self._settings
        return places.Room(
            places=settings.max_loaded_models,
            gpus_each=settings.num_gpus_per_model,
            gpus=capacity.get("GPU", 0.0) - gpus(running) if capacity else None,
            gpus_of_next_job=gpus(next_job),
            wait_seconds=settings.model_wait_seconds,
            idle_seconds=settings.model_idle_seconds,
        )

    async def _serve_models(self, view: ServeView, room: places.Room) -> None:
        """Make Ray Serve run what has a place, and nothing else of ours."""
        present = {name for name, app in view.applications.items() if app.state != "stopping"}
        async with self._store.begin() as session:
            wanted = await deployments.place(session, self._settings, view.applications, room)
        names = {deployment.app_name for deployment in wanted}
        version = hash(frozenset(names))
        if names == present or not self._patience.is_due(MODELS, version):
            return
        self._patience.fail(MODELS, version)  # until Ray takes them
        await self._launcher.serve(wanted)
        self._patience.forget(MODELS)


async def _without_slots(
    session: AsyncSession, live: Sequence[Job], opened: Collection[str]
) -> tuple[set[str], set[str]]:
    """Running jobs that hold nothing: those that rest for long after a death, and those whose long rest is over."""
    resting, back = set[str](), set[str]()
    for job in live:
        if job.observed == "running" and job.id not in opened:
            past = await store.history(session, job.id)
            if leaves_slot(past.failures):
                (resting if past.rested_seconds < rest_seconds(past.failures) else back).add(job.id)
    return resting, back

"""Compares what is wanted with what is observed, and acts. Level-triggered: a missed tick loses nothing.

Unknown is never failed: without Ray's own word on an attempt, nothing changes.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import httpx
from sqlalchemy.exc import SQLAlchemyError

from services.control_plane import attempts, deployments, jobs, journal, quotas, store, telemetry
from services.control_plane.decision import HUNG_SECONDS, Decision, Past, Stopwatches, decide, pause_seconds
from services.control_plane.executor import Executor
from services.control_plane.launcher import AttemptStatus, Launcher
from services.control_plane.queue import what_each_waits_for
from services.control_plane.settings import Settings
from services.control_plane.store import Store
from services.control_plane.sweeper import Sweeper
from services.control_plane.tables import Attempt, Job

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
LEASE_SECONDS = 10.0
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
            shares, out_of_hours = await quotas.shares(session), await quotas.out_of_hours(session)
        reachable = await self._launcher.is_reachable()
        spent = {job.id: out_of_hours[job.project_id] for job in live if job.project_id in out_of_hours}
        contenders = [job for job in live if job.observed == "running" or job.id not in spent]
        waits = spent | (
            await self._schedule(contenders, shares)
            if reachable
            else dict.fromkeys((job.id for job in live), UNREACHABLE)
        )
        for job in live:
            slot = (waiting_for := waits.get(job.id)) is None
            try:
                if waiting_for and job.observed == "queued":
                    await self._wait(job, waiting_for)
                    continue
                attempt = opened.get(job.id)
                with journal.about(job_id=job.id, attempt=attempt.number if attempt else None):
                    await self._reconcile(job, attempt, slot)
            except (jobs.Stale, SQLAlchemyError, httpx.HTTPError, OSError) as error:
                # One job's trouble is not the others': it is looked at again in the next tick.
                log.warning("Job %s is left as it is for now: %s", job.id, error)
            except Exception:
                log.exception("Job %s is left as it is for now, and its trouble is ours", job.id)
        await self._serve_models()
        telemetry.TICKS.labels("acted").inc()

    def _sweep(self) -> None:
        """Beside the ticks: it lists and deletes in storage, which may take longer than a lease."""
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(self._sweeper.sweep())

    async def _schedule(self, live: Sequence[Job], shares: Mapping[str, quotas.Share]) -> dict[str, str | None]:
        """What each queued job waits for, if anything."""
        if all(job.observed != "queued" for job in live):
            return {}
        capacity = await self._launcher.capacity()
        return what_each_waits_for(live, shares, capacity, self._settings)

    async def _wait(self, job: Job, what: str) -> None:
        if job.waits_for != what:
            async with self._store.begin() as session:
                await jobs.wait_for(session, job, what)

    async def _reconcile(self, job: Job, attempt: Attempt | None, slot: bool) -> None:
        """One decision for one job, carried out."""
        status: AttemptStatus = "unknown"
        if attempt is not None:
            status = await self._launcher.status(attempt.submission_id)
            if status == "running" and attempts.silent_seconds(attempt) > QUIET_SECONDS:
                attempt = await self._executor.collect(job, attempt)
        async with self._store.begin() as session:
            total, failures = await store.past_attempts(session, job.id)
        past = Past(
            slot=slot,
            failures=failures,
            limit=self._settings.max_attempts,
            hung=self._hung(attempt, status),
            overdue=self._stopwatches.seconds(f"{job.id} pauses", job.desired == "pause") > pause_seconds(job),
        )
        decision = decide(job, attempt, status, past, collected=False)
        if decision is Decision.COLLECT and attempt is not None:
            attempt = await self._executor.collect(job, attempt)
            decision = decide(job, attempt, status, past, collected=True)
        if decision is not Decision.WAIT:
            log.info("Job %s: %s", job.id, decision.name.lower())
        await self._executor.carry_out(decision, job, attempt, total, status)

    def _hung(self, attempt: Attempt | None, status: AttemptStatus) -> bool:
        """Silence counts from when Ray first said, to this control plane, that the attempt runs."""
        if attempt is None:
            return False
        holds = None if status == "unknown" else status == "running"
        running = self._stopwatches.seconds(f"{attempt.submission_id} runs", holds)
        return min(running, attempts.silent_seconds(attempt)) > HUNG_SECONDS

    async def _serve_models(self) -> None:
        """Make Ray Serve run what is wanted, and nothing else."""
        applications = (await self._launcher.look()).applications
        present = {name for name, app in applications.items() if app.state != "stopping"}
        async with self._store.begin() as session:
            wanted = await deployments.wanted(session, self._settings, present)
        if {deployment.app_name for deployment in wanted} != present:
            await self._launcher.serve(wanted)

"""Moves every job, once a second, from its observed state towards the state that its user wants.

An attempt is one run of a job on the Ray cluster. A tick is one pass over all jobs that have not ended. Each tick reads
the state anew from the database and Ray, so a missed tick loses nothing. While Ray gives no information about an
attempt, the attempt does not count as failed and is left unchanged.

Several control planes may run. Only the one that holds the lease, a row in the database that expires if it is not
renewed, handles jobs.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial

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
from services.control_plane.attempts.scheduling import FOR_MODELS, Misfit, needs, reference_model, what_each_waits_for
from services.control_plane.attempts.step_retries import EVENT_AFTER, TRIES, Patience, in_words, is_ours
from services.control_plane.cleanup import Sweeper
from services.control_plane.core import log_setup, store, telemetry
from services.control_plane.core.store import NO_ATTEMPTS, Store
from services.control_plane.core.tables import Attempt, Job
from services.control_plane.files import files
from services.control_plane.jobs import jobs
from services.control_plane.jobs.plans.plans import MISFIT_AFTER
from services.control_plane.models.deployments import deployments, eviction
from services.control_plane.models.deployments import settings as deployment_settings
from services.control_plane.models.deployments.deployments import Reference
from services.control_plane.ray_api import UNKNOWN, AttemptStatus, RayApi, ServeView, Submission
from services.control_plane.settings import Settings
from services.control_plane.tenants import quotas

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0  # from the begin of a tick to the begin of the next one
LEAST_PAUSE_SECONDS = 0.2  # between two ticks, also if a tick took longer than TICK_SECONDS, or `wake` is called
LEASE_SECONDS = 10.0
MODELS = "models"  # the name under which Patience counts failures to load models
AT_ONCE = 8  # jobs that a tick handles at the same time, so that a slow job does not delay all others
UNREACHABLE = "the Ray cluster to answer"
QUIET_SECONDS = 10.0  # after this long without a report, the attempt's spool is read


class Reconciler:
    """The background task that moves all jobs forward: it starts their attempts (runs on Ray), follows them and records
    how they end.

    Every control plane runs one. Only the control plane that holds the lease acts. The lease is a row in the database
    that expires if it is not renewed.
    """

    def __init__(
        self,
        store: Store,
        ray_api: RayApi,
        settings: Settings,
        *,
        holder: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._ray_api, self._settings = store, ray_api, settings
        self._holder = holder  # this control plane's name in the lease
        self._leads = False
        self._woken = asyncio.Event()  # set to end the pause before the next tick
        self._slot_is_free = False  # whether the last tick ended an attempt, so that a waiting job may start
        self._clock, self._job_began = clock, float("-inf")  # when this reconciler last saw a job begin
        self._patience = Patience(clock)
        self._stopwatches = Stopwatches(gap_seconds=LEASE_SECONDS, clock=clock)
        self._executor = Executor(store, ray_api, settings, holder=holder)
        self._sweeper = Sweeper(store, ray_api, settings)
        self._sweeping: asyncio.Task[None] | None = None
        self._trouble = log_setup.Trouble(log, "Reconciler")

    async def run(self) -> None:
        """Handles all jobs every second, until cancelled. Does so sooner if an attempt (run of a job on Ray) has ended,
        or `wake` was called.

        When cancelled, releases the lease, which is the right of one control plane to handle jobs.
        """
        try:
            while True:
                began = time.monotonic()
                try:
                    with telemetry.TICK_SECONDS.time():
                        await self.tick()
                    self._trouble.passed()
                except Exception as error:
                    telemetry.TICKS.labels("failed").inc()
                    is_away = isinstance(error, SQLAlchemyError | httpx.HTTPError | OSError)
                    message = "The regular look at all jobs failed and is tried again in a second: %r"
                    self._trouble.failed(message, error, exc_info=not is_away)
                if self._leads:
                    self._sweep()
                if not self._slot_is_free:
                    await asyncio.sleep(LEAST_PAUSE_SECONDS)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._woken.wait(), began + TICK_SECONDS - time.monotonic())
                self._woken.clear()
        finally:
            if self._sweeping is not None:
                self._sweeping.cancel()
                await asyncio.wait({self._sweeping})
            with suppress(SQLAlchemyError, OSError):
                await self.release()

    def wake(self) -> None:
        """Makes the next tick (pass over all jobs) begin at once, but not sooner than LEAST_PAUSE_SECONDS after the end
        of the last tick.
        """
        self._woken.set()

    async def release(self) -> None:
        """Releases this control plane's lease (the right to handle jobs), so that another control plane need not wait
        until it expires.
        """
        async with self._store.begin() as session:
            await store.release_lease(session, "reconciler", self._holder)

    async def tick(self) -> None:
        """Looks once at every job that has not ended and acts on it. Then tells Ray Serve which models to load and
        unload.

        Does nothing if another control plane holds the lease, which is the right to handle jobs.
        """
        self._slot_is_free = False
        async with self._store.begin() as session:
            self._leads = await store.hold_lease(session, "reconciler", self._holder, seconds=LEASE_SECONDS)
            if not self._leads:
                telemetry.TICKS.labels("stood_by").inc()
                return
            self._stopwatches.look()
            live, opened = await store.live_jobs(session), await store.open_attempts(session)
            resting, back = await _without_slots(session, live, opened)
            shares, out_of_hours = await quotas.shares(session), await quotas.out_of_hours(session)
            unchecked = await files.checks_awaited(session, [job for job in live if job.observed == "queued"])
            on_gpus = await deployment_settings.use_gpus(session, self._settings)
            wanted = {job.id: model for job in live if (model := reference_model(job))}
            scorers = await deployments.references(session, self._settings, wanted)
        asked = [attempt.submission_id for attempt in opened.values()]
        view, told, capacity = await asyncio.gather(
            self._look(), self._ray_api.submissions(asked), self._capacity(live, back, on_gpus)
        )
        spent = {job.id: out_of_hours[job.project_id] for job in live if job.project_id in out_of_hours}
        holders = {job.id for job in live if job.observed == "running"} - resting - back
        held_back = spent | unchecked
        contenders = [job for job in live if job.id in holders or job.id not in held_back.keys() | resting]
        engines = await self._engines(view, [job for job in live if job.id in holders], capacity, scorers)
        waits = held_back | (
            what_each_waits_for(contenders, shares, capacity, self._settings, back, engines, scorers)
            if view is not None
            else dict.fromkeys((job.id for job in live), UNREACHABLE)
        )
        turns = asyncio.Semaphore(AT_ONCE)

        async def look_at(job: Job) -> None:
            async with turns:
                await self._look_at(job, opened.get(job.id), waits.get(job.id), told)

        # Jobs that may start come first, so that no start waits for the ends of other jobs.
        live.sort(key=lambda job: job.observed != "queued" or waits.get(job.id) is not None)
        await asyncio.gather(*map(look_at, live))
        await self._wait([(job, what) for job in live if job.observed == "queued" and (what := waits.get(job.id))])
        if view is None:
            raise httpx.HTTPError("the Ray cluster does not answer")
        if capacity:
            await self._fail_misfits([job for job in live if job.id in waits], waits)
        running = [job for job in contenders if waits.get(job.id) is None]
        if any(job.id not in holders for job in running):
            self._job_began = self._clock()
        next_job = [job for job in contenders if waits.get(job.id) == FOR_MODELS]
        await self._serve_models(view, self._room(running, next_job, capacity, scorers))
        telemetry.TICKS.labels("acted").inc()

    async def _look_at(
        self, job: Job, attempt: Attempt | None, waits_for: str | None, told: Mapping[str, Submission]
    ) -> None:
        """Decides on the job's next action and carries it out.

        `attempt` is the job's current attempt (run on Ray), and `told` what Ray says about attempts, by submission id.
        `waits_for` is the reason why the job may not start, None if the job may start.
        """
        if waits_for and job.observed == "queued":
            return

        async def reconcile() -> None:
            await self._reconcile(job, attempt, told[attempt.submission_id] if attempt else UNKNOWN, waits_for)

        await self._try(job, attempt, reconcile)

    async def _try(self, job: Job, attempt: Attempt | None, act: Callable[[], Awaitable[None]]) -> None:
        """Calls `act`, which carries out an action for the job, unless such an action failed a short time ago.

        `attempt` is the job's current attempt (run on Ray). If the action fails, it is tried again a second or more
        later, and the other jobs are not affected.
        """
        if not self._patience.is_due(job.id, job.version):
            return
        try:
            with log_setup.about(job_id=job.id, attempt=attempt.number if attempt else None):
                await act()
            self._patience.forget(job.id)
        except jobs.Stale as error:
            log.warning(
                "Job %s changed while the service looked at it, so the service looks at it again a second later: %s",
                job.id,
                error,
            )
        except Exception as error:
            await self._put_off(job, attempt, error)

    async def _put_off(self, job: Job, attempt: Attempt | None, error: Exception) -> None:
        """Counts that the reconciler has failed to handle the job. The reconciler tries again a second or more later.

        `attempt` is the job's current attempt (run on Ray), and `error` is why the reconciler failed. If it fails TRIES
        times, the job fails, too. While the database, storage or Ray are down, the number of tries is unlimited.
        """
        tries, ours = self._patience.fail(job.id, job.version), is_ours(error)
        log.warning(
            "The service failed to carry out the next action of job %s, %d times by now: %r",
            job.id,
            tries,
            error,
            exc_info=ours,
        )
        try:
            if ours and tries >= TRIES:
                await self._executor.abandon(job, attempt, in_words(error), tries)
            elif tries == EVENT_AFTER:
                async with self._store.begin() as session:
                    message = (
                        f"The service could not carry out the job's next action and keeps trying: {in_words(error)}"
                    )
                    jobs.tell(session, job.id, message, level="warn")
        except Exception as trouble:  # no error here may stop the tick
            log.warning("The failed action of job %s could not be recorded: %r", job.id, trouble)

    def _sweep(self) -> None:
        """Starts the cleanup of storage and the database as a task of its own, unless it is running already.

        The cleanup may take longer than this control plane's lease (its right to handle jobs) lasts, so the handling of
        jobs must not wait for it.
        """
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(self._sweeper.sweep())

    async def _look(self) -> ServeView | None:
        """Returns the state of Ray Serve. Returns None if Ray does not answer.

        While Ray does not answer, no attempt (run of a job on Ray) is launched, because it could not be stopped.
        """
        try:
            return await self._ray_api.look()
        except httpx.HTTPError:
            return None

    async def _capacity(self, live: Sequence[Job], back: Collection[str], on_gpus: bool) -> dict[str, float]:
        """Returns the numbers of the cluster's CPUs and GPUs, under the keys "CPU" and "GPU". Returns {}, without
        asking Ray, if nothing needs these numbers now.

        The numbers are needed if a job waits for its turn, or if models use GPUs (`on_gpus`). `live` are the jobs that
        have not ended, and `back` the ids of running jobs that wait for their turn again.
        """
        waits = back or on_gpus or any(job.observed == "queued" for job in live)
        return await self._ray_api.capacity() if waits else {}

    async def _wait(self, reasons: Sequence[tuple[Job, str]]) -> None:
        """Stores what jobs wait for, in one transaction for all jobs whose reason has changed. `reasons` are pairs of a
        job and its reason to wait.
        """
        limit = f"; after {MISFIT_AFTER.days} days of this, the job fails"
        told = [(job, what + limit if isinstance(what, Misfit) else what) for job, what in reasons]
        if new := [(job, what) for job, what in told if job.waits_for != what]:
            async with self._store.begin() as session:
                await jobs.wait_for(session, new)

    async def _fail_misfits(self, waiting: Sequence[Job], waits: Mapping[str, str | None]) -> None:
        """Ends those jobs for which the cluster has been too small for a week.

        `waiting` are all jobs that wait, and `waits` holds their reasons by job id. A reason of the type Misfit says
        that the cluster is too small.
        """
        misfits = {job.id: what for job in waiting if isinstance(what := waits[job.id], Misfit)}
        if not misfits and all(job.misfit_since is None for job in waiting):
            return
        async with self._store.begin() as session:
            overdue = await jobs.note_misfits(session, [job.id for job in waiting], misfits)
        for job in waiting:
            if job.id in overdue:
                await self._try(job, None, partial(self._executor.fail_misfit, job, misfits[job.id]))

    async def _reconcile(
        self, job: Job, attempt: Attempt | None, submission: Submission, waits_for: str | None
    ) -> None:
        """Decides on one action for the job and carries it out.

        `attempt` is the job's current attempt (run on Ray), None if there is none, and `submission` is what Ray says
        about the attempt. `waits_for` is the reason why the job may not start, None if the job may start.
        """
        status = submission.status
        if attempt is not None and status == "running" and attempt.silent_seconds > QUIET_SECONDS:
            attempt = await self._executor.collect(job, attempt)
        history = NO_ATTEMPTS  # while an attempt is open, nothing depends on the earlier ones
        if attempt is None:
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
            await self._wait([(job, waits_for)])
            return
        if decision is not Decision.WAIT:
            log.info("Job %s: %s", job.id, decision.name.lower())
        await self._executor.carry_out(decision, job, attempt, history, submission)
        self._slot_is_free |= decision in (Decision.FINISH, Decision.REST, Decision.LOSE)

    def _hung(self, attempt: Attempt | None, status: AttemptStatus) -> bool:
        """Whether the attempt (run of a job on Ray) hangs: Ray says that it runs, but the attempt has given no sign of
        life for HUNG_SECONDS. `status` is what Ray says about the attempt.

        Silence counts only from the moment at which Ray first told this process that the attempt runs.
        """
        if attempt is None:
            return False
        holds = None if status == "unknown" else status == "running"
        running = self._stopwatches.seconds(f"{attempt.submission_id} runs", holds)
        return min(running, attempt.silent_seconds) > HUNG_SECONDS

    async def _engines(
        self,
        view: ServeView | None,
        running: Sequence[Job],
        capacity: Mapping[str, float],
        scorers: Mapping[str, Reference],
    ) -> eviction.Engines:
        """Returns which models are pinned (always kept loaded), how many GPUs loaded models use, and whether a waiting
        model gets GPUs before the next job.

        `view` is the state of Ray Serve, `running` are the running jobs, and `capacity` holds the numbers of CPUs and
        GPUs of the cluster. `scorers` maps a job's id to the Ray Serve application of the job's reference model.
        """
        if view is None:
            return eviction.NO_ENGINES
        async with self._store.begin() as session:
            wished = await deployments.wishes(session, self._settings, view.applications)
        stopping = [app for name, app in view.applications.items() if app.state == "stopping" or name not in wished]
        one = self._settings.num_gpus_per_model
        return eviction.engines(
            wished.values(),
            sum(app.deployment.most_gpus if app.deployment else one for app in stopping),
            self._room(running, [], capacity, scorers),
            capacity=capacity.get("GPU", 0.0),
            since_last_job=self._clock() - self._job_began,
        )

    def _room(
        self,
        running: Sequence[Job],
        next_job: Sequence[Job],
        capacity: Mapping[str, float],
        scorers: Mapping[str, Reference],
    ) -> eviction.Room:
        """Returns how many models may be loaded at a time, and how many GPUs the running jobs leave to models.

        `running` are the running jobs. `next_job` holds the job that waits for GPUs of models, if there is one.
        `capacity` holds the numbers of CPUs and GPUs of the cluster. `scorers` maps a job's id to the Ray Serve
        application of the job's reference model.
        """

        def gpus(jobs: Sequence[Job]) -> float:
            return sum(needs(job, self._settings, scorers).get("GPU", 0.0) for job in jobs)

        settings = self._settings
        return eviction.Room(
            places=settings.max_loaded_models,
            gpus=capacity.get("GPU", 0.0) - gpus(running) if capacity else None,
            gpus_of_next_job=gpus(next_job),
            wait_seconds=settings.model_wait_seconds,
        )

    async def _serve_models(self, view: ServeView, room: eviction.Room) -> None:
        """Makes Ray Serve run exactly the models of this service that should be loaded, each with its settings.

        `view` is the state of Ray Serve, and `room` holds the numbers of models and GPUs that are allowed. Also tells
        each model which of its adapters were deleted, so that the model no longer answers for these adapters.
        """
        present = {name: app for name, app in view.applications.items() if app.state != "stopping"}
        async with self._store.begin() as session:
            wanted = await deployments.place(session, self._settings, view.applications, room)
            deleted = await deployments.deleted_adapters(session, wanted)
        is_served = {each.app_name: each for each in wanted} == {name: app.deployment for name, app in present.items()}
        if is_served and all(names <= present[app_name].deleted_adapters for app_name, names in deleted.items()):
            return
        version = hash((frozenset(each.model_dump_json() for each in wanted), frozenset(deleted.items())))
        if not self._patience.is_due(MODELS, version):
            return
        self._patience.fail(MODELS, version)  # counted as a failure until Ray accepts the models
        await self._ray_api.serve(wanted, deleted)
        self._patience.forget(MODELS)


async def _without_slots(
    session: AsyncSession, live: Sequence[Job], opened: Collection[str]
) -> tuple[set[str], set[str]]:
    """Finds the running jobs that wait long for their next attempt (run on Ray) after a failed one. Such jobs do not
    count as running. Returns two sets of their ids:

    - the jobs whose pause before the next attempt is not over;
    - the jobs whose pause is over, and that wait for their turn like queued jobs.

    `live` are all jobs that have not ended, and `opened` the ids of the jobs with a current attempt, which are in
    neither set.
    """
    resting, back = set[str](), set[str]()
    for job in live:
        if job.observed == "running" and job.id not in opened:
            past = await store.history(session, job.id)
            if leaves_slot(past.failures):
                (resting if past.rested_seconds < rest_seconds(past.failures) else back).add(job.id)
    return resting, back

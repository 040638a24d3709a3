"""Carries out the decisions about jobs: launches, stops and ends attempts, and ends jobs.

An attempt is one run of a job on the Ray cluster. Carrying out a decision twice is harmless.
"""

import time
from tempfile import TemporaryFile

import anyio.to_thread
import httpx
from sqlalchemy.ext.asyncio import AsyncSession

from services import spool, storage, tracing
from services.contract import WIRE, Adapter, AttemptSpec, JobEvent, JobSpec, Message, Reading, Weights
from services.control_plane.attempts import attempts
from services.control_plane.attempts.decision import Decision, rest_seconds
from services.control_plane.attempts.scheduling import Misfit, reference_model
from services.control_plane.core import telemetry
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.store import History, Store, history
from services.control_plane.core.tables import Attempt, File, Job, reading_of
from services.control_plane.files import files
from services.control_plane.jobs import admission, jobs
from services.control_plane.jobs.checkpoint_evaluations import checkpoint_evaluations
from services.control_plane.jobs.plans.plans import DOES_NOT_FIT, MISFIT_AFTER
from services.control_plane.jobs.results import write_results
from services.control_plane.models import models
from services.control_plane.models.deployments import deployments
from services.control_plane.ray_api import RayApi, Refused, Submission, rays_words
from services.control_plane.settings import Settings
from services.spool import DamagedSegment

LAUNCH_SECONDS = 900  # an attempt fails if Ray answers its launch with errors for this long


class Executor:
    """Carries out decisions about jobs, such as to launch or to stop a job's attempt (its run on Ray).

    Each method raises jobs.Stale if the job has changed since the decision was made, and passes on errors of the
    database, storage and Ray. After an error, the job stays as it is until the next decision.
    """

    def __init__(self, store: Store, ray_api: RayApi, settings: Settings, *, holder: str) -> None:
        self._store, self._ray_api, self._settings = store, ray_api, settings
        self._holder = holder  # this control plane's name in the log of transitions

    async def carry_out(
        self, decision: Decision, job: Job, attempt: Attempt | None, past: History, submission: Submission
    ) -> None:
        """Carries out a decision about a job.

        `attempt` is the job's open attempt (its current run on Ray), `submission` is what Ray says about this attempt,
        and `past` holds the numbers of the job's earlier attempts and of their failures.
        """
        if decision in (Decision.OPEN, Decision.LAUNCH) and (error := jobs.unreadable(job) or await self._unfit(job)):
            await self._fail(job, error, attempt)
            return
        match decision:
            case Decision.WAIT:
                return
            case Decision.OPEN:
                await self._launch(job, await self._open(job, past.total + 1))
            case Decision.PAUSE:
                async with self._store.begin() as session:
                    await jobs.move(session, job, "paused", actor=self._holder, event="The job is paused")
            case Decision.CANCEL:
                async with self._store.begin() as session:
                    await jobs.move(session, job, "cancelled", actor=self._holder, event="The job was cancelled")
            case Decision.GIVE_UP:
                await self._give_up(job)
            case _:
                assert attempt is not None
                await self._carry_out_on(decision, job, attempt, submission)

    async def _carry_out_on(self, decision: Decision, job: Job, attempt: Attempt, submission: Submission) -> None:
        match decision:
            case Decision.LAUNCH:
                await self._launch(job, attempt)
            case Decision.ADOPT:
                async with self._store.begin() as session:
                    await attempts.mark_launched(session, attempt)
            case Decision.STOP:
                await self._stop(job, attempt)
            case Decision.FINISH:
                await self._finish(job, attempt)
            case Decision.REST:
                await self._rest(job, attempt)
            case Decision.LOSE:
                await self._lose(job, attempt, submission)

    async def _unfit(self, job: Job) -> dict[str, str | None] | None:
        """Returns the `code`, `message` and `param` of the error with which a queued job must end, because the job
        cannot use one of its files.

        Returns None if the job can use all its files. The files are checked again when the job starts, because the rows
        of a large file may be checked only after the job was submitted.
        """
        if job.observed != "queued":
            return None
        try:
            async with self._store.begin() as session:
                await admission.check_files(session, JobSpec.model_validate(job.spec))
        except InvalidRequest as refusal:
            return {"code": refusal.code, "message": refusal.message, "param": refusal.param}
        return None

    # --- attempts ---------------------------------------------------------------------------

    async def _open(self, job: Job, number: int) -> Attempt:
        """Adds the row of the job's next attempt (run on Ray), and marks a queued job as running, in one transaction.

        `number` is the attempt's number within the job. If vLLM must compute the log-probabilities of the reference
        model, the same transaction also requests that this model is loaded. In two cases the transaction does not
        request the model:

        - The attempt may choose between vLLM and its own training workers. The attempt then requests the model itself
          when it needs the model.
        - The job has begun to train, so the log-probabilities are stored already.
        """
        spec = JobSpec.model_validate(job.spec)
        insists = spec.reference_source == "serve" and reference_model(job) is not None
        accelerators = spec.num_workers * self._settings.num_gpus_per_worker
        async with self._store.begin() as session:
            await jobs.confirm(session, job)
            app_name = None
            if insists:
                reference = await deployments.reference(session, self._settings, models.reference_of(job))
                app_name = reference.app_name
                await deployments.use(session, reference.loaded, app_name=app_name, for_job=True)
            attempt = await attempts.begin(session, job.id, number, app_name, num_accelerators=accelerators)
            if job.observed == "queued":
                started = "The job is starting on the cluster"
                await jobs.move(session, job, "running", actor=self._holder, event=started)
        if number == 1:
            telemetry.QUEUE_SECONDS.observe((attempt.created_at - job.created_at).total_seconds())
        return attempt

    async def _launch(self, job: Job, attempt: Attempt) -> None:
        """Submits the attempt (run of the job) to Ray, after writing its spec (what its training processes are to do)
        to storage.

        A repeated launch is harmless, because Ray accepts a submission id only once.
        """
        spec = JobSpec.model_validate(job.spec)
        training_uri = spec.training_file
        async with self._store.begin() as session:
            if not spec.is_at_uri:
                training_uri = (await session.get_one(File, spec.training_file)).uri
            held_out = await session.get_one(File, spec.validation_file) if spec.validation_file else None
            token = await attempts.give_token(session, attempt)
            scorer = await deployments.reference(session, self._settings, models.reference_of(job))
            if attempt.reference:  # settings may have changed since the attempt was opened
                await attempts.want(session, attempt, scorer.loaded, scorer.app_name)
        run_uri = self._run_uri(job)
        reference = await self._ray_api.own_name(scorer.app_name) if spec.may_be_served else None
        adapter = scorer.adapter if reference else None
        attempt_spec = AttemptSpec(
            wire=_wire_of(spec, adapter),
            job_id=job.id,
            attempt=attempt.number,
            config=spec.config,
            num_workers=spec.num_workers,
            num_gpus_per_worker=self._settings.num_gpus_per_worker,
            training_uri=training_uri,
            today=job.created_at.date(),
            dataset_uris=tuple(self._settings.dataset_uris) if spec.is_at_uri else None,
            validation_uri=held_out.uri if held_out else None,
            validation_reading=reading_of(held_out) if held_out else Reading(),
            validation_share=spec.validation_share,
            invalid_rows=spec.invalid_rows,
            columns=spec.columns,
            model_source=job.model_source,
            weights=spec.weights,
            policy=spec.policy,
            reference_model_source=job.reference_source,
            reference=reference,
            reference_adapter=adapter,
            reference_source=spec.reference_source,
            reference_dtype=self._settings.reference_dtype,
            traceparent=job.traceparent and tracing.child(job.traceparent, attempt.submission_id),
            run_uri=run_uri,
            cache_uri=storage.join(self._settings.storage_url, "prepared", job.project_id),
            integrations=spec.integrations,
            fine_tuned_model=jobs.fine_tuned_name(job, self._settings),
            events_url=f"{self._settings.advertised_url}/internal/attempts/{job.id}/{attempt.number}/events",
        )
        spec_uri = storage.join(run_uri, "attempts", f"{attempt.number}.json")
        await anyio.to_thread.run_sync(storage.write_bytes, spec_uri, attempt_spec.model_dump_json().encode())
        try:
            await self._ray_api.submit(attempt.submission_id, spec_uri, token)
        except Refused as refusal:
            await self._refuse(job, attempt, f"Ray refuses to start the attempt: {refusal}")
            return
        except httpx.HTTPStatusError as error:
            if attempt.silent_seconds < LAUNCH_SECONDS:
                raise
            await self._refuse(
                job,
                attempt,
                f"Ray did not start the attempt within {LAUNCH_SECONDS} s: {rays_words(error.response.text)}",
            )
            return
        async with self._store.begin() as session:
            await attempts.mark_launched(session, attempt)

    async def _refuse(self, job: Job, attempt: Attempt, reason: str) -> None:
        """Ends an attempt (run of the job on Ray) that was not launched, because Ray refused it or did not start it in
        time.

        `reason` says what happened. The end counts as a failure, so that the number of such attempts is limited.
        """
        async with self._store.begin() as session:
            await self._close(session, job, attempt, reason, failed=True)

    async def collect(self, job: Job, attempt: Attempt) -> Attempt:
        """Records the reports of the attempt (run of the job on Ray) that did not arrive by HTTP. Returns the attempt's
        current row.

        The reports are read from the attempt's spool, the files in storage to which its training process writes all
        reports.
        """
        listed = await anyio.to_thread.run_sync(spool.segments, self._run_uri(job), attempt.number)
        segments = _segments_from(listed, attempt.next_seq)
        for first, uri in segments:
            try:
                events = (await anyio.to_thread.run_sync(spool.read, uri)).events
            except DamagedSegment as error:
                if (first, uri) != segments[-1]:
                    continue  # the next segment brings the event about missing reports
                lost = Message(
                    level="warn",
                    message=(
                        f"The last reports of attempt {attempt.number} are lost, "
                        f"so events or metrics are missing: {error}"
                    ),
                )
                events = [JobEvent(seq=first, created_at=time.time(), report=lost)]
            async with self._store.begin() as session:
                await attempts.record(session, job.id, attempt.number, events, self._settings, posted=False)
        async with self._store.begin() as session:
            return await session.get_one(Attempt, (job.id, attempt.number))

    async def _stop(self, job: Job, attempt: Attempt) -> None:
        """Asks Ray to stop the attempt (run of the job). Unless the user cancelled the job, also stores why the attempt
        is stopped, and adds an event to the job that says so.

        The reconciler, the task that handles all jobs, calls this method about once a second until the attempt has
        ended. Only the first call adds an event.
        """
        if job.desired != "cancel":
            late = "the job was asked to pause and did not pause in time" if job.desired == "pause" else None
            reason = late or f"its training process sent no report for {attempt.silent_seconds:.0f} s"
            async with self._store.begin() as session:
                await attempts.note_stop(session, attempt, reason)
        await self._ray_api.stop(attempt.submission_id)

    async def _rest(self, job: Job, attempt: Attempt) -> None:
        """Ends an attempt (a run of the job on Ray) that stopped because the service asked it to stop.

        If the user still wants a pause, pauses the job. If the user no longer wants a pause, the job continues with its
        next attempt.
        """
        step = (attempt.outcome or {})["step"]
        where = f" after step {step}" if step else ""
        async with self._store.begin() as session:
            await jobs.confirm(session, job)
            await attempts.end(session, attempt, f"the service stopped the attempt{where}")
            if job.desired == "pause":
                await jobs.move(session, job, "paused", actor=self._holder, event=f"The job is paused{where}")
            else:
                jobs.tell(session, job.id, f"The service stopped attempt {attempt.number} of the job{where}")

    async def _lose(self, job: Job, attempt: Attempt, submission: Submission) -> None:
        """Ends an attempt (a run of the job on Ray) that died without reporting an outcome.

        `submission` is what Ray says about the attempt. The end counts as a failure if Ray still knows the attempt and
        the user has asked neither for a pause nor for a cancellation.
        """
        failed = submission.status == "ended" and job.desired == "run"
        reason = attempt.reason or submission.cause()
        applications = (await self._ray_api.look()).applications if attempt.reference else {}
        reference = applications.get(attempt.reference or "")
        async with self._store.begin() as session:
            await jobs.confirm(session, job)
            await self._close(session, job, attempt, reason, failed=failed)
            if attempt.reference and reference and reference.state == "failed":
                await deployments.forget(session, attempt.reference)  # so that the next attempt loads this model again

    async def _close(self, session: AsyncSession, job: Job, attempt: Attempt, reason: str, *, failed: bool) -> None:
        """Ends an attempt (run of the job on Ray) that did not report how it ended. Adds an event to the job that gives
        `reason`.

        `failed` says whether the end counts as a failure. The event is added only once, even if several control planes
        end the attempt.
        """
        if await attempts.end(session, attempt, reason, failed=failed) and job.desired == "run":
            rest = await self._rest_after_failure(session, job) if failed else ""
            jobs.tell(session, job.id, f"Attempt {attempt.number} of the job ended: {reason}{rest}", level="warn")

    async def _rest_after_failure(self, session: AsyncSession, job: Job) -> str:
        """Stores in the job's column `waits_for` when its next attempt (run on Ray) begins. Returns the end of a
        sentence that says this, such as "; the next attempt begins 30 s later".

        Returns '' if no attempt follows, because too many attempts in a row have failed.
        """
        failures = (await history(session, job.id)).failures
        if failures >= self._settings.max_attempts:
            return ""
        seconds = f"{rest_seconds(failures):.0f} s"
        counted = f"{failures} of at most {self._settings.max_attempts} attempts in a row died without a new checkpoint"
        await jobs.hold_back(session, job, f"its next attempt, {seconds} after the last one: {counted}")
        return f"; the next attempt begins {seconds} later"

    def _run_uri(self, job: Job) -> str:
        return storage.join(self._settings.storage_url, "runs", job.id)

    # --- ends -------------------------------------------------------------------------------

    async def _finish(self, job: Job, attempt: Attempt) -> None:
        """Ends the job as succeeded or failed, as the last report of its attempt (run on Ray) says."""
        outcome = attempt.outcome or {}
        if outcome["kind"] == "succeeded":
            await self._succeed(job, attempt, outcome["model_uri"], outcome["trained_tokens"])
            return
        error = {key: outcome[key] for key in ("code", "message", "param")}
        await self._fail(job, error, attempt)

    async def _succeed(self, job: Job, attempt: Attempt, model_uri: str, trained_tokens: int) -> None:
        """Marks the job as succeeded, and adds its trained model and its file of metrics, in one transaction.
        The same transaction plans the evaluations of the model that the job asks for.

        `model_uri` is the folder of the model in storage, and `trained_tokens` the number of tokens that the job
        trained on.
        """
        name = jobs.fine_tuned_name(job, self._settings)
        with TemporaryFile() as file:
            async with self._store.snapshot() as session:
                await write_results(session, job.id, file)
            file.seek(0)
            stored = await files.store_file(file, self._settings)
        async with self._store.begin() as session:
            await jobs.confirm(session, job)
            results = await files.add(
                session, stored, filename="step_metrics.csv", purpose=files.RESULTS, project_id=job.project_id
            )
            await models.add(session, name, model_uri, job)
            await checkpoint_evaluations.plan(session, job, name, "policy")
            await attempts.end(session, attempt, "succeeded")
            jobs.tell(session, job.id, f"New fine-tuned model created: {name}")
            jobs.tell(session, job.id, f"Completed results file: {results.id}")
            closed = {"fine_tuned_model": name, "trained_tokens": trained_tokens, "result_file": results.id}
            await jobs.move(
                session, job, "succeeded", closed, actor=self._holder, event="The job has successfully completed"
            )

    async def abandon(self, job: Job, attempt: Attempt | None, why: str, tries: int) -> None:
        """Marks the job as failed, because the service failed `tries` times to carry out the job's next action.

        `why` is the last error.
        """
        message = (
            f"The service tried {tries} times to carry out the job's next action and failed: {why}. Tell the operator, "
            "who finds more in the service's log, and submit the job again when the cause is fixed."
        )
        await self._fail(job, {"code": "internal_error", "message": message, "param": None}, attempt)

    async def fail_misfit(self, job: Job, misfit: Misfit) -> None:
        """Marks the job as failed, because the cluster has been too small for it for a week. `misfit` says what the job
        waits for."""
        message = f"The job waited {MISFIT_AFTER.days} days for {misfit}. {misfit.remedy}"
        await self._fail(job, {"code": DOES_NOT_FIT, "message": message, "param": None}, None)

    async def _give_up(self, job: Job) -> None:
        async with self._store.begin() as session:
            cause = await attempts.last_failure(session, job.id)
        message = (
            f"The job died {self._settings.max_attempts} times in a row on the cluster without a new checkpoint, the "
            f"last time because {cause}. The job's logs say more: `raydpo jobs logs {job.id}`, or "
            f"GET /v1/x/jobs/{job.id}/logs. Submit the job again when the cause is fixed."
        )
        await self._fail(job, {"code": "infrastructure_failure", "message": message, "param": None}, None)

    async def _fail(self, job: Job, error: dict[str, str | None], attempt: Attempt | None) -> None:
        async with self._store.begin() as session:
            if attempt is not None:
                await attempts.end(session, attempt, "failed")
            event = f"The job failed: {error['message']}"
            await jobs.move(session, job, "failed", {"error": error}, actor=self._holder, event=event, level="error")


def _wire_of(spec: JobSpec, reference_adapter: Adapter | None) -> int:
    """Returns the version of the contract (the messages between control plane and training) that the cluster must know
    to run the job.

    The cluster may run a training program of an older release, which does not know newer options. The version is 1 for
    a job without newer options. `spec` is the job's description. `reference_adapter` is the job's reference model if
    this model is an adapter, else None.
    """
    if reference_adapter is not None:
        return WIRE
    asks_more = spec.weights != Weights() or spec.reference_model or spec.config.early_stop or spec.policy != "last"
    return 2 if asks_more else 1


def _segments_from(segments: list[tuple[int, str]], next_seq: int) -> list[tuple[int, str]]:
    """Returns the segments of a spool that may hold report number `next_seq` or later reports.

    A spool is the files in storage with the reports of an attempt (run of a job). A segment is one of these files, as a
    pair: the number of its first report, and its URI.
    """
    start = max((i for i, (first, _) in enumerate(segments) if first <= next_seq), default=0)
    return segments[start:]

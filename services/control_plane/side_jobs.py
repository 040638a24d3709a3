"""Runs side jobs: programs in Ray jobs that do not train, such as checks of files and merges of adapters.

A side job has a folder in storage. The folder's name is a digest of everything that the result depends on, so the same
work is done only once. The folder has a subfolder for each attempt (run of the program), numbered from 1, with
`request.json` and, when the attempt is done, `report.json`. For each attempt, a row of the table `checks` says to which
project the attempt belongs. A project may run only a few side jobs at the same time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import anyio.to_thread
import httpx
from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services import storage
from services.contract import Contract, Failed, SideJobResult
from services.control_plane.core.errors import RateLimited, Unavailable
from services.control_plane.core.store import ProjectStore, Store
from services.control_plane.core.tables import SideJobAttempt
from services.control_plane.ray_api import RayApi, Refused
from services.control_plane.tenants import projects

WAIT_SECONDS = 60.0  # how long a request waits for the result
POLL_SECONDS = 0.5
FAILURE_SECONDS = 60.0  # a failure is reported for this long; then the side job is tried again
RETRY_AFTER_SECONDS = 15
LAUNCHING_SECONDS = 120.0  # from the writing of a side job's row until Ray knows the side job
LONGEST_SECONDS = 3600.0  # a side job is stopped after this long
KEPT = timedelta(days=7)  # how long results are kept, from the end of a side job


@dataclass(frozen=True)
class SideJob:
    """The description of a side job: a program that runs beside training, as a short Ray job. Side jobs with the same
    `key` share one result.
    """

    what: str  # such as "check": a word for messages and error codes
    key: str  # a digest of everything that the result depends on
    uri: str  # a folder of its own in storage
    program: str  # name of the Python module
    request_in: Callable[[str], Contract]  # returns the program's input, for the URI of an attempt's folder

    @property
    def id(self) -> str:
        return f"{self.what}-{self.key}"

    def folder(self, attempt: int) -> str:
        return storage.join(self.uri, str(attempt))

    def submission_id(self, attempt: int) -> str:
        """Returns the id under which this attempt (run of the program) is submitted to Ray."""
        return f"{self.id}-{attempt}"


async def result_of(
    job: SideJob,
    store: ProjectStore,
    ray_api: RayApi,
    most: int,
    is_disconnected: Callable[[], Awaitable[bool]],
) -> SideJobResult | None:
    """Runs the side job (a short Ray job beside training), unless it runs already or is done, and returns its result.

    Returns None if the side job still runs after WAIT_SECONDS. Also returns None if `is_disconnected` says that the
    client, which waits for the result, has disconnected. Raises Unavailable if Ray refuses the side job or does not
    answer. Raises RateLimited if the project already runs `most` side jobs, the largest number that it may run.
    """
    attempt, result = await _newest(job)
    if result is None:
        attempt = await _launch(job, attempt, store, ray_api, most)
    deadline = time.monotonic() + WAIT_SECONDS
    while result is None and time.monotonic() < deadline and not await is_disconnected():
        ended = await ray_api.status(job.submission_id(attempt)) == "ended"
        result = await _read(job, attempt)  # read after the status: the job writes its result before it ends
        if result is None and ended:
            what = (
                f"The {job.what} ended without a result; "
                f"the log of the Ray job {job.submission_id(attempt)} says why. Try again."
            )
            return SideJobResult(finished_at=time.time(), error=Failed(code=f"{job.what}_lost", message=what))
        if result is None:
            await asyncio.sleep(POLL_SECONDS)
    return result


async def seconds_running(job: SideJob, store: ProjectStore) -> float:
    """Returns how many seconds ago the newest attempt of the side job (run of its program) began. Returns 0 if there is
    no attempt.
    """
    mine = SideJobAttempt.submission_id.startswith(f"{job.id}-", autoescape=True)
    begun = select(func.extract("epoch", func.clock_timestamp() - func.max(SideJobAttempt.created_at))).where(mine)
    async with store.look() as session:
        return float(await session.scalar(begun) or 0.0)


async def known(job: SideJob) -> SideJobResult | None:
    """Returns the stored result of an earlier run of the side job (a short Ray job beside training). Returns None if
    there is no such result.
    """
    return (await _newest(job))[1]


async def _newest(job: SideJob) -> tuple[int, SideJobResult | None]:
    """Returns the number of the newest attempt of the side job (a run of its program) and the result of this attempt.
    The number is 0 if there is no attempt; the result is None if the attempt has none yet.

    If the newest attempt failed more than FAILURE_SECONDS ago, returns the number after it, of an attempt that does not
    exist yet, and None. The caller then tries the side job again.
    """
    folders: list[str] = await anyio.to_thread.run_sync(storage.list_folders, job.uri)
    attempt = max(map(int, folders), default=0)
    result = await _read(job, attempt) if attempt else None
    if result and result.error and time.time() - result.finished_at > FAILURE_SECONDS:
        return attempt + 1, None
    return attempt, result


async def _launch(job: SideJob, attempt: int, store: ProjectStore, ray_api: RayApi, most: int) -> int:
    """Launches the attempt (run of the side job's program) with this number, unless it runs already or has a result.

    If this attempt died without a result, launches the next one. Returns the number of the attempt that runs. A
    repeated launch is harmless, because Ray accepts a submission id only once. Raises Unavailable if Ray refuses the
    launch or does not answer, and RateLimited if `most` side jobs of the project run already.
    """
    attempt = max(1, attempt)
    status = await ray_api.status(job.submission_id(attempt))
    while status == "ended" and await _read(job, attempt) is None:  # Ray keeps the ids of attempts long forgotten
        attempt += 1
        status = await ray_api.status(job.submission_id(attempt))
    if status == "absent":
        await _admit(job.submission_id(attempt), job.folder(attempt), store, ray_api, most)
        uri = storage.join(job.folder(attempt), "request.json")
        request = job.request_in(job.folder(attempt))
        await anyio.to_thread.run_sync(storage.write_bytes, uri, request.model_dump_json().encode())
        try:
            await ray_api.submit_side_job(job.submission_id(attempt), job.program, uri)
        except Refused as refusal:
            raise Unavailable(
                f"The Ray cluster refuses to run the {job.what}: {refusal}", retry_after=60, code=f"{job.what}_refused"
            ) from None
        except httpx.HTTPError:  # either the answer was lost, or the side job was not launched
            status = await ray_api.status(job.submission_id(attempt))
            status = "unknown" if status == "absent" else status
    if status == "unknown":
        message = f"The Ray cluster does not answer. Try again in {RETRY_AFTER_SECONDS} seconds."
        raise Unavailable(message, retry_after=RETRY_AFTER_SECONDS, code="cluster_unavailable")
    return attempt


async def _read(job: SideJob, attempt: int) -> SideJobResult | None:
    uri = storage.join(job.folder(attempt), "report.json")
    try:
        data: bytes = await anyio.to_thread.run_sync(partial(storage.read_bytes, uri))
    except FileNotFoundError:
        return None
    return SideJobResult.model_validate_json(data)


# --- how many ---------------------------------------------------------------------------------


async def _admit(submission_id: str, folder: str, store: ProjectStore, ray_api: RayApi, most: int) -> None:
    """Records in the database that an attempt (run of a side job, a short Ray job beside training) is about to start.
    `submission_id` is the attempt's id in Ray, and `folder` its folder in storage.

    Raises RateLimited if `most` side jobs of the project run already.
    """
    for is_last_try in (False, True):
        async with store.begin() as session:
            await projects.lock(session, store.project_id)
            running = await _running(session)
            if any(each.submission_id == submission_id for each, _ in running):
                return
            if len(running) < most:
                # Ray may have lost an attempt that has a row already; it runs again.
                again = update(SideJobAttempt).where(SideJobAttempt.submission_id == submission_id)
                again = again.values(created_at=func.clock_timestamp(), ended_at=None)
                if await session.scalar(again.returning(SideJobAttempt.submission_id)) is None:
                    session.add(SideJobAttempt(submission_id=submission_id, folder=folder))
                return
        if not is_last_try:
            ended = [each.submission_id for each, age in running if not await _lives(each, age, ray_api)]
            async with store.begin() as session:
                await _note_ends(session, ended)
    message = (
        f"The project runs {most} checks and merges, which is the limit (max_running_checks); wait for one to end."
    )
    raise RateLimited(message, seconds=RETRY_AFTER_SECONDS, headers={})


async def _running(session: AsyncSession) -> list[tuple[SideJobAttempt, float]]:
    """Returns the attempts (runs of side jobs, which are short Ray jobs beside training) whose ends have not been
    stored yet, each with its age in seconds.
    """
    age = func.extract("epoch", func.clock_timestamp() - SideJobAttempt.created_at)
    rows = await session.execute(select(SideJobAttempt, age).where(SideJobAttempt.ended_at.is_(None)))
    return [(row, float(age)) for row, age in rows]


async def _lives(row: SideJobAttempt, age: float, ray_api: RayApi) -> bool:
    """Whether the attempt (run of a side job, a short Ray job beside training) may be running. `age` is the age of its
    row in seconds.

    Returns False if Ray says that the attempt ended. Also returns False if Ray does not know the attempt and the row is
    older than LAUNCHING_SECONDS, the time within which a launched attempt reaches Ray.
    """
    status = await ray_api.status(row.submission_id)
    return status != "ended" and not (status == "absent" and age > LAUNCHING_SECONDS)


async def _note_ends(session: AsyncSession, submission_ids: list[str]) -> None:
    ended = update(SideJobAttempt).where(SideJobAttempt.submission_id.in_(submission_ids))
    await session.execute(ended.values(ended_at=func.clock_timestamp()))


async def stop_late(store: Store, ray_api: RayApi) -> list[str]:
    """Stops side jobs (short Ray jobs beside training) that have run for more than LONGEST_SECONDS. Returns their
    submission ids.

    Also records in the database which side jobs have ended.
    """
    async with store.begin() as session:
        running = await _running(session)
    ended, late = list[str](), list[str]()
    for row, age in running:
        if not await _lives(row, age, ray_api):
            ended.append(row.submission_id)
        elif age > LONGEST_SECONDS and await ray_api.try_to_stop(row.submission_id):
            late.append(row.submission_id)
    async with store.begin() as session:
        await _note_ends(session, ended)
    return late


async def forget_old(session: AsyncSession, most: int) -> list[str]:
    """Deletes the rows of at most `most` side jobs (short Ray jobs beside training) that ended more than KEPT ago.
    Returns their storage folders.

    The caller must delete the folders after the commit.
    """
    old = select(SideJobAttempt.submission_id).where(SideJobAttempt.ended_at < func.now() - KEPT).limit(most)
    forgotten = delete(SideJobAttempt).where(SideJobAttempt.submission_id.in_(old)).returning(SideJobAttempt.folder)
    return list(await session.scalars(forgotten))

"""Checks training files with a model: a Ray job finds out how the rows would be encoded in training.

A check has a folder in storage. A digest of everything that the result depends on is the folder's name, so the same
content is checked once. The folder has a subfolder for each attempt, numbered from 1, with `request.json` and, when the
attempt is done, `report.json`. A row of the table `checks` names the project of each attempt. A project may run only a
few checks at once.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import anyio.to_thread
import httpx
from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.config import TrainConfig
from services import storage
from services.contract import CheckRequest, CheckResult, Failed, Recipe
from services.control_plane.core.errors import RateLimited, Unavailable
from services.control_plane.core.store import ProjectStore, Store
from services.control_plane.core.tables import DatasetCheck, File, reading_of
from services.control_plane.models.models import NamedModel
from services.control_plane.ray_api import RayApi, Refused
from services.control_plane.settings import Settings
from services.control_plane.tenants import projects

CHECKING = 1  # the version of the check; raise the version when the same content gives another result
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.5
FAILURE_SECONDS = 60.0  # a failure is reported for this long; then the check is tried again
RETRY_AFTER_SECONDS = 15
LAUNCHING_SECONDS = 120.0  # from the writing of a check's row until Ray knows the check
LONGEST_SECONDS = 3600.0  # a check is stopped after this long
KEPT = timedelta(days=7)  # from the end of a check


@dataclass(frozen=True)
class Check:
    """A check of one training file with one model."""

    id: str
    uri: str
    recipe: Recipe

    def folder(self, attempt: int) -> str:
        return storage.join(self.uri, str(attempt))

    def submission_id(self, attempt: int) -> str:
        """Returns the submission id under which Ray runs the attempt."""
        return f"{self.id}-{attempt}"


def check_of(file: File, model: NamedModel, config: TrainConfig, settings: Settings, instance: str) -> Check:
    """Returns the check of a file with a model. The same bytes, model and options give the same check.

    Projects do not share checks, so that no project learns which files another project has checked. Services on one
    cluster do not share checks either.
    """
    reading, project = reading_of(file), file.project_id
    content = [
        CHECKING,
        instance,
        project,
        file.sha256,
        model.source,
        config.max_length,
        config.truncation,
        reading.model_dump(),
    ]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    recipe = Recipe(
        training_uri=file.uri,
        model_source=model.source,
        max_length=config.max_length,
        truncation=config.truncation,
        **dict(reading),
    )
    return Check(f"check-{key}", storage.join(settings.storage_url, "checks", key), recipe)


async def result_of(
    check: Check,
    store: ProjectStore,
    ray_api: RayApi,
    settings: Settings,
    is_disconnected: Callable[[], Awaitable[bool]],
) -> CheckResult | None:
    """Runs the check, unless it runs already, and returns its result.

    Returns None if the check still runs after a minute, or the client has disconnected. Raises Unavailable if Ray
    refuses the check or does not answer, and RateLimited if too many checks of the project are running.
    """
    attempt, result = await _newest(check)
    if result is None:
        attempt = await _launch(check, attempt, store, ray_api, settings.max_running_checks)
    deadline = time.monotonic() + WAIT_SECONDS
    while result is None and time.monotonic() < deadline and not await is_disconnected():
        ended = await ray_api.status(check.submission_id(attempt)) == "ended"
        result = await _read(check, attempt)  # read after the status: the job writes its result before it ends
        if result is None and ended:
            what = f"The check ended without a result; the log of {check.submission_id(attempt)} in Ray says why."
            return CheckResult(finished_at=time.time(), error=Failed(code="check_lost", message=what))
        if result is None:
            await asyncio.sleep(POLL_SECONDS)
    return result


async def known(check: Check) -> CheckResult | None:
    """Returns the result of an earlier check of the same content; None if there is none."""
    return (await _newest(check))[1]


async def _newest(check: Check) -> tuple[int, CheckResult | None]:
    """Returns the number of the check's newest attempt (0 if there is none) and the attempt's result.

    If that attempt failed more than FAILURE_SECONDS ago, returns the next number and no result.
    """
    folders: list[str] = await anyio.to_thread.run_sync(storage.list_folders, check.uri)
    attempt = max(map(int, folders), default=0)
    result = await _read(check, attempt) if attempt else None
    if result and result.error and time.time() - result.finished_at > FAILURE_SECONDS:
        return attempt + 1, None
    return attempt, result


async def _launch(check: Check, attempt: int, store: ProjectStore, ray_api: RayApi, most: int) -> int:
    """Launches the attempt unless it runs already, or the next attempt if this one died. Returns the attempt's number.

    A repeated launch is harmless.
    """
    attempt = max(1, attempt)
    status = await ray_api.status(check.submission_id(attempt))
    if status == "ended" and await _read(check, attempt) is None:
        attempt += 1
        status = await ray_api.status(check.submission_id(attempt))
    if status == "absent":
        await _admit(check.submission_id(attempt), check.folder(attempt), store, ray_api, most)
        uri = storage.join(check.folder(attempt), "request.json")
        request = CheckRequest(recipe=check.recipe, folder_uri=check.folder(attempt))
        await anyio.to_thread.run_sync(storage.write_bytes, uri, request.model_dump_json().encode())
        try:
            await ray_api.submit_check(check.submission_id(attempt), uri)
        except Refused as refusal:
            raise Unavailable(f"Ray refuses the check: {refusal}", retry_after=60, code="check_refused") from None
        except httpx.HTTPError:  # either the answer was lost, or the check was not launched
            status = await ray_api.status(check.submission_id(attempt))
            status = "unknown" if status == "absent" else status
    if status == "unknown":
        message = f"The Ray cluster does not answer. Try again in {RETRY_AFTER_SECONDS} seconds."
        raise Unavailable(message, retry_after=RETRY_AFTER_SECONDS, code="cluster_unavailable")
    return attempt


async def _read(check: Check, attempt: int) -> CheckResult | None:
    uri = storage.join(check.folder(attempt), "report.json")
    try:
        data: bytes = await anyio.to_thread.run_sync(partial(storage.read_bytes, uri))
    except FileNotFoundError:
        return None
    return CheckResult.model_validate_json(data)


# --- how many ---------------------------------------------------------------------------------


async def _admit(submission_id: str, folder: str, store: ProjectStore, ray_api: RayApi, most: int) -> None:
    """Adds the row of a check that is about to run. Raises RateLimited if `most` checks of the project run already."""
    for is_last_try in (False, True):
        async with store.begin() as session:
            await projects.lock(session, store.project_id)
            running = await _running(session)
            if any(each.submission_id == submission_id for each, _ in running):
                return
            if len(running) < most:
                session.add(DatasetCheck(submission_id=submission_id, folder=folder))
                return
        if not is_last_try:
            ended = [each.submission_id for each, age in running if not await _lives(each, age, ray_api)]
            async with store.begin() as session:
                await _note_ends(session, ended)
    message = f"{most} checks of the project are running, the limit of max_running_checks; wait for one to end."
    raise RateLimited(message, seconds=RETRY_AFTER_SECONDS, headers={})


async def _running(session: AsyncSession) -> list[tuple[DatasetCheck, float]]:
    """Returns the checks whose ends have not been stored yet, each with its age in seconds."""
    age = func.extract("epoch", func.clock_timestamp() - DatasetCheck.created_at)
    rows = await session.execute(select(DatasetCheck, age).where(DatasetCheck.ended_at.is_(None)))
    return [(row, float(age)) for row, age in rows]


async def _lives(check: DatasetCheck, age: float, ray_api: RayApi) -> bool:
    """Whether the check may be running.

    False if Ray says that the check ended, or still does not know the check LAUNCHING_SECONDS after its row was
    written.
    """
    status = await ray_api.status(check.submission_id)
    return status != "ended" and not (status == "absent" and age > LAUNCHING_SECONDS)


async def _note_ends(session: AsyncSession, submission_ids: list[str]) -> None:
    ended = update(DatasetCheck).where(DatasetCheck.submission_id.in_(submission_ids))
    await session.execute(ended.values(ended_at=func.clock_timestamp()))


async def stop_late(store: Store, ray_api: RayApi) -> list[str]:
    """Stops checks that run for more than LONGEST_SECONDS. Returns the submission ids of the stopped checks.

    Also stores the ends of the checks that have ended.
    """
    async with store.begin() as session:
        running = await _running(session)
    ended, late = list[str](), list[str]()
    for check, age in running:
        if not await _lives(check, age, ray_api):
            ended.append(check.submission_id)
        elif age > LONGEST_SECONDS:
            await ray_api.stop(check.submission_id)
            late.append(check.submission_id)
    async with store.begin() as session:
        await _note_ends(session, ended)
    return late


async def forget_old(session: AsyncSession, most: int) -> list[str]:
    """Deletes the rows of checks that ended more than KEPT ago. Returns the storage folders of these checks.

    The caller must delete the folders after the commit.
    """
    old = select(DatasetCheck.submission_id).where(DatasetCheck.ended_at < func.now() - KEPT).limit(most)
    forgotten = delete(DatasetCheck).where(DatasetCheck.submission_id.in_(old)).returning(DatasetCheck.folder)
    return list(await session.scalars(forgotten))

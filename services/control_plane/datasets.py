"""Checks of training files with a model: a Ray job finds out what encoding would do, once for the same content.

A check has a folder, named by all that its result depends on, and in it a folder for each attempt, numbered from 1:
`request.json`, and `report.json` when it is done.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import anyio.to_thread
import httpx

from dpo_core.config import TrainConfig
from services import storage
from services.contract import CheckRequest, CheckResult, Failed, Recipe
from services.control_plane.errors import Unavailable
from services.control_plane.launcher import Launcher, Refused
from services.control_plane.models import NamedModel
from services.control_plane.settings import Settings
from services.control_plane.tables import File, reading_of

CHECKING = 1  # raised when the same content gives another result
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.5
FAILURE_SECONDS = 60.0  # so long a failure is told; then the user may have mended it, and it is tried again
RETRY_AFTER_SECONDS = 15


@dataclass(frozen=True)
class Check:
    """A file as one model would see it."""

    id: str
    uri: str
    recipe: Recipe

    def folder(self, attempt: int) -> str:
        return storage.join(self.uri, str(attempt))

    def submission_id(self, attempt: int) -> str:
        """Of the attempt's Ray job."""
        return f"{self.id}-{attempt}"


def check_of(file: File, model: NamedModel, config: TrainConfig, settings: Settings, instance: str) -> Check:
    """The same for the same bytes, model and options; another service on the cluster has another one."""
    reading = reading_of(file)
    content = [CHECKING, instance, file.sha256, model.source, config.max_length, config.truncation, file.reading]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    recipe = Recipe(
        training_uri=file.uri,
        model_source=model.source,
        max_length=config.max_length,
        truncation=config.truncation,
        invalid_rows=reading.invalid_rows,
        columns=reading.columns,
    )
    return Check(f"check-{key}", storage.join(settings.storage_url, "checks", key), recipe)


async def result_of(
    check: Check, launcher: Launcher, is_disconnected: Callable[[], Awaitable[bool]]
) -> CheckResult | None:
    """What the check found; None if it still runs after a minute, or nobody waits. Raises Unavailable."""
    attempt, result = await _newest(check)
    if result is None:
        attempt = await _launch(check, attempt, launcher)
    deadline = time.monotonic() + WAIT_SECONDS
    while result is None and time.monotonic() < deadline and not await is_disconnected():
        ended = await launcher.status(check.submission_id(attempt)) == "ended"
        result = await _read(check, attempt)  # after the status: it is written before the job ends
        if result is None and ended:
            what = f"The check ended without a result; the log of {check.submission_id(attempt)} in Ray says why."
            return CheckResult(finished_at=time.time(), error=Failed(code="check_lost", message=what))
        if result is None:
            await asyncio.sleep(POLL_SECONDS)
    return result


async def _newest(check: Check) -> tuple[int, CheckResult | None]:
    """The last attempt, 0 before the first, and its result. After an old failure: the next one."""
    folders: list[str] = await anyio.to_thread.run_sync(storage.list_uris, check.uri)
    attempt = len(folders)
    result = await _read(check, attempt) if attempt else None
    if result and result.error and time.time() - result.finished_at > FAILURE_SECONDS:
        return attempt + 1, None
    return attempt, result


async def _launch(check: Check, attempt: int, launcher: Launcher) -> int:
    """Sees to it that the attempt runs, or the next one if it is dead. Doing it twice is harmless."""
    attempt = max(1, attempt)
    status = await launcher.status(check.submission_id(attempt))
    if status == "ended" and await _read(check, attempt) is None:
        attempt += 1
        status = await launcher.status(check.submission_id(attempt))
    if status == "absent":
        uri = storage.join(check.folder(attempt), "request.json")
        request = CheckRequest(recipe=check.recipe, folder_uri=check.folder(attempt))
        await anyio.to_thread.run_sync(storage.write_bytes, uri, request.model_dump_json().encode())
        try:
            await launcher.submit_check(check.submission_id(attempt), uri)
        except Refused as refusal:
            raise Unavailable(f"Ray refuses the check: {refusal}", retry_after=60, code="check_refused") from None
        except httpx.HTTPError:  # its answer was lost, or it was not launched
            status = await launcher.status(check.submission_id(attempt))
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

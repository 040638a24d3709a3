"""Checks the rows of training files: small files before the upload is answered, large files in the background.

A large file is stored unchecked. Every control plane looks for unchecked files. To check a file, a control plane takes
the file's lease, which is the right to check the file. So no two control planes check a file at the same time. If a
control plane dies, another one repeats the check.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar
from sqlalchemy import Select, exists, func, literal, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from services.contract import Reading
from services.control_plane.core.errors import InvalidRequest, Unavailable
from services.control_plane.core.leases import NOBODY, take
from services.control_plane.core.store import Store, hold_lease, refuses_value
from services.control_plane.core.tables import UNCHECKED, File, Lease, reading_of
from services.control_plane.core.turns import Turns
from services.control_plane.files.check_program import check_rows
from services.control_plane.files.files import Stored

log = logging.getLogger(__name__)

IN_PROCESS_BYTES = 4 * 2**20  # checking this many bytes takes 0.1 s, less than starting a process
AT_ONCE = 4  # the most processes at the same time, each of 90 MiB, even if there are more cores
AT_ONCE_BYTES = 512 * 2**20  # checking this many bytes takes 12 s; proxies cut responses off after 60 s
LEAST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 30.0, 3600.0  # after a check that failed
GIVEN_UP_AFTER = timedelta(days=1)
LEASE = "check of "  # the name of a file's lease is this text and the file's id


_turns: RunVar[Turns] = RunVar("checks at once")


class Died(Exception):
    """Raised if the process that checks a file's rows ended without a report."""


async def report_of(stored: Stored, reading: Reading, *, param: str, project_id: str) -> dict[str, Any] | None:
    """Checks the rows of a stored file before the upload is answered, and returns the report on the rows. Returns None
    for a large file, which a background task checks later.

    `reading` holds the options for reading the rows, and `param` is the request's field that holds the file.
    `project_id` is the project that uploads the file; checks of several projects take turns. Raises InvalidRequest,
    which names the first bad line, and Unavailable if the process that checks the rows died.
    """
    if stored.num_bytes > AT_ONCE_BYTES:
        return None
    try:
        outcome = await _run_check(stored.uri, stored.num_bytes, reading, project_id)
    except Died:
        log.exception("The process that checks the rows of an uploaded file died")
        raise Unavailable(
            "The process that checked the file's rows died; send the file again.", retry_after=5
        ) from None
    if outcome["refusal"]:
        raise InvalidRequest(outcome["refusal"], param=param, code="invalid_file_format")
    report: dict[str, Any] = outcome["report"]
    return report


async def _run_check(
    uri: str, num_bytes: int, reading: Reading, project_id: str, tell: Callable[[int], None] | None = None
) -> dict[str, Any]:
    if num_bytes <= IN_PROCESS_BYTES:
        return await anyio.to_thread.run_sync(check_rows, uri, reading)
    async with _processes().turn(project_id):
        return await _run_program(uri, reading, tell)


def _processes() -> Turns:
    """Returns the object that limits how many processes of this control plane check rows at the same time. Each check
    of rows must hold the object while it runs. Projects whose checks wait take turns.
    """
    try:
        return _turns.get()
    except LookupError:
        _turns.set(Turns(min(AT_ONCE, max(2, os.cpu_count() or 1))))
        return _turns.get()


async def _run_program(uri: str, reading: Reading, tell: Callable[[int], None] | None) -> dict[str, Any]:
    command = (sys.executable, "-m", "services.control_plane.files.check_program", uri, reading.model_dump_json())
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, limit=2**24)
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        errors = asyncio.create_task(process.stderr.read())
        said: dict[str, Any] = {}
        async for line in process.stdout:
            said = json.loads(line)
            if tell is not None and "num_checked" in said:
                tell(said["num_checked"])
        if await process.wait() != 0 or "report" not in said:
            how = f"exit status {process.returncode} and no report: {(await errors)[-2000:].decode(errors='replace')}"
            raise Died(f"The process that checked the rows of {uri} ended with {how}")
        return said
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class RowChecker:
    """The background work that checks the rows of large files, one file at a time."""

    at_once = 1

    def __init__(self, store: Store) -> None:
        self._store = store
        self._num_checked: dict[str, int] = {}  # bytes that were checked so far, by the ids of files under way

    def lease_of(self, row: File) -> str:
        return f"{LEASE}{row.id}"

    async def claim(self, session: AsyncSession, holder: str) -> File | None:
        """Takes the lease of an unchecked file (the right to check the file) for the control plane `holder`. Returns
        the file's row.

        Returns None if every unchecked file is taken. Also marks a file as refused if no check of the file has
        succeeded for a day.
        """
        await session.execute(
            update(File)
            .where(text(UNCHECKED), File.created_at < func.now() - GIVEN_UP_AFTER)
            .values(refusal="The service could not check the file's rows for a day; upload the file again.")
        )
        for row in await session.scalars(_next(20)):
            if await take(session, self.lease_of(row), holder):
                return row
        return None

    async def work(self, row: File) -> None:
        """Checks the file's rows, and stores the result."""

        def tell(num_bytes: int) -> None:
            self._num_checked[row.id] = num_bytes

        try:
            outcome = await _run_check(row.uri, row.num_bytes, reading_of(row), row.project_id, tell)
        finally:
            self._num_checked.pop(row.id, None)
        await self._conclude(row, **outcome)

    async def goes_on(self, session: AsyncSession, row: File) -> bool:
        """Stores how many bytes of the file have been checked. Returns False if the file was deleted meanwhile."""
        return await _write(session, row, num_checked=self._num_checked.get(row.id, 0))

    async def interrupted(self, session: AsyncSession, row: File, error: Exception) -> None:
        """Postpones the next check of the file. If no check has succeeded for a day, the method `claim` marks the file
        as refused.
        """
        age = await session.scalar(select(func.extract("epoch", func.now() - File.created_at)).where(File.id == row.id))
        await hold_lease(session, self.lease_of(row), NOBODY, seconds=pause_seconds(float(age or 0)))

    async def _conclude(self, row: File, **outcome: Any) -> None:
        try:
            async with self._store.begin() as session:
                await _write(session, row, **outcome, num_checked=row.num_bytes)
        except DBAPIError as error:
            if not refuses_value(error):
                raise
            refusal = (
                "The report on the file's rows cannot be stored, because the file has NUL characters, or others that "
                "the database cannot store; remove them."
            )
            async with self._store.begin() as session:
                await _write(session, row, refusal=refusal, num_checked=row.num_bytes)


async def _write(session: AsyncSession, row: File, **values: Any) -> bool:
    """Sets columns of a file that is not checked yet. Returns False, and changes nothing, if it was checked or
    deleted.
    """
    statement = update(File).where(text(UNCHECKED), File.id == row.id).values(**values).returning(File.id)
    return await session.scalar(statement) is not None


def _next(most: int) -> Select[File]:
    """Returns the SQL query for the `most` files to check next: the oldest of each project, then the second oldest, and
    so on.

    Files that are being checked, or whose check failed seconds ago, are left out, but keep their position in the order
    of their project.
    """
    place = func.row_number().over(partition_by=File.project_id, order_by=(File.created_at, File.id))
    unchecked = select(File.id, place.label("place")).where(text(UNCHECKED)).subquery()
    leased = exists().where(Lease.name == literal(LEASE) + File.id, Lease.expires_at > func.clock_timestamp())
    query = select(File).join(unchecked, unchecked.c.id == File.id).where(~leased)
    return query.order_by(unchecked.c.place, File.created_at, File.id).limit(most)


def pause_seconds(age_seconds: float) -> float:
    """Returns how many seconds to wait after a failed check of a file of this age.

    The pause is half the age, but not less than a lower and not more than an upper limit. So the pauses grow, and a
    file is checked about 30 times in a day.
    """
    return min(max(age_seconds / 2, LEAST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)

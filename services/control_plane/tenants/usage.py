"""Counts the requests, tokens and accelerator seconds of completions, by project, key, model and day.

Every control plane adds up the usage of its answers in memory. Every FLUSH_SECONDS it writes the sums to the database,
in one transaction. A crash loses the sums that were not written yet.

Nothing is counted twice: each batch of sums has a number. A batch is written only if its number is higher than that of
the last batch from the same control plane.
"""

import asyncio
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import delete, func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.log_setup import Trouble
from services.control_plane.core.store import Store
from services.control_plane.core.tables import UsageRow, UsageWriter

log = logging.getLogger(__name__)

FLUSH_SECONDS = 10.0
WRITERS_KEPT = timedelta(days=1)  # how long a batch's number is kept; no write is repeated after this time


@dataclass(frozen=True)
class Account:
    """The project, API key, model and day to which usage is charged."""

    project_id: str
    key_id: str
    model_id: str
    day: date  # in UTC


@dataclass
class Used:
    """The numbers of requests and tokens, and the accelerator seconds, that completions used."""

    num_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    accelerator_seconds: float = 0.0


class UsageRecorder:
    """Adds up the usage of completions that this process answers, and writes the sums to the database."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writer = secrets.token_hex(8)
        self._batch = 0
        self._sums: dict[Account, Used] = {}
        self._unwritten: dict[Account, Used] = {}  # a batch whose writing failed, or was not confirmed
        self._writing, self._trouble = asyncio.Lock(), Trouble(log, "UsageRecorder")

    def add(
        self,
        project_id: str,
        key_id: str,
        model_id: str,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        accelerator_seconds: float,
    ) -> None:
        """Adds one completion request to the sums in memory: its tokens, and its accelerator seconds (GPU seconds)."""
        account = Account(project_id, key_id, model_id, datetime.now(UTC).date())
        used = self._sums.setdefault(account, Used())
        used.num_requests += 1
        used.prompt_tokens += prompt_tokens
        used.completion_tokens += completion_tokens
        used.accelerator_seconds += accelerator_seconds

    async def run(self) -> None:
        """Writes the sums of usage to the database every FLUSH_SECONDS. Runs until cancelled; then writes the sums that
        are not written yet.
        """
        try:
            while True:
                await asyncio.sleep(FLUSH_SECONDS)
                await self.flush()
        finally:
            await self.flush()
            if not self._unwritten:  # if an earlier batch was written just now, the newer sums are still left
                await self.flush()

    async def flush(self) -> None:
        """Writes the sums of usage in memory to the database as one batch. If this fails, the next call writes the same
        batch again.
        """
        async with self._writing:
            if not self._unwritten:
                self._unwritten, self._sums = self._sums, {}
                self._batch += bool(self._unwritten)
            if not self._unwritten:
                return
            try:
                async with self._store.begin() as session:
                    await _write(session, self._writer, self._batch, self._unwritten)
                self._unwritten = {}
                self._trouble.passed()
            except (SQLAlchemyError, OSError) as error:
                message = "The usage of %d accounts is not written yet and is tried again: %s"
                self._trouble.failed(message, len(self._unwritten), error)


async def _write(session: AsyncSession, writer: str, batch: int, sums: Mapping[Account, Used]) -> None:
    """Adds a batch of sums of usage to the table of usage, unless this batch was written before.

    `writer` is the id of this control plane, and `batch` the batch's number.
    """
    row = insert(UsageWriter).values(id=writer, batch=batch)
    newer = {"batch": batch, "written_at": func.now()}
    row = row.on_conflict_do_update(index_elements=[UsageWriter.id], set_=newer, where=UsageWriter.batch < batch)
    if await session.scalar(row.returning(UsageWriter.batch)) is None:
        return
    # Sorted, so that control planes that write at the same time lock the rows in the same order.
    accounts = sorted(sums, key=lambda account: (account.project_id, account.key_id, account.model_id, account.day))
    added = insert(UsageRow).values([{**vars(account), **vars(sums[account])} for account in accounts])
    names = list(vars(Used()))
    total = {name: getattr(UsageRow, name) + added.excluded[name] for name in names}
    await session.execute(added.on_conflict_do_update(index_elements=list(vars(accounts[0])), set_=total))


async def forget_writers(session: AsyncSession) -> None:
    """Deletes the rows of control planes that have written no usage for a day. Such a row holds the number of a control
    plane's last batch of usage, so that no batch counts twice."""
    await session.execute(delete(UsageWriter).where(UsageWriter.written_at < func.now() - WRITERS_KEPT))

"""Refused requests in the audit log: what a known key may not do, or would change that is not there for it.

So that nobody fills the log, the first refusals of a key in a minute have a line each. Those that follow are counted,
and one line tells of all that are alike when the minute is over.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

from fastapi import Request
from sqlalchemy.exc import SQLAlchemyError

from services.contract import storable
from services.control_plane.auth.keys import Caller
from services.control_plane.core.errors import ApiError, Forbidden, NotFound, OverQuota, Unauthorized
from services.control_plane.core.store import Store, append
from services.control_plane.core.tables import AuditEntry

log = logging.getLogger(__name__)

LINES = 10  # of a key in a minute, in each replica
MINUTE_SECONDS = 60.0
LONGEST_NAME = 100  # characters of what a path names, which need not exist
READING = ("GET", "HEAD")


class Refusals:
    """One in every control plane. It counts what it has seen itself."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lines: Counter[str] = Counter()  # written in this minute, by key
        self._more: dict[tuple[str, str, int, str | None], AuditEntry] = {}  # what is beyond, by kind

    async def note(self, request: Request, error: ApiError) -> None:
        """Write the refusal, or count it, where it belongs into the log."""
        caller: Caller | None = getattr(request.state, "caller", None)
        if caller is None or not _belongs(request, error):
            return
        entry = _entry(request, caller, error)
        self._lines[caller.key_id] += 1
        if self._lines[caller.key_id] <= LINES:
            await self._write([entry])
            return
        kind = (entry.key_id, entry.action, entry.status, entry.code)
        if kind in self._more:
            self._more[kind].num_requests += 1
        else:
            entry.object_id = None  # each may name another
            self._more[kind] = entry

    async def run(self) -> None:
        """Begin a new minute until cancelled, and write what is counted then, too."""
        try:
            while True:
                await asyncio.sleep(MINUTE_SECONDS)
                await self.end_minute()
        finally:
            await self.end_minute()

    async def end_minute(self) -> None:
        """Write one line for all that are alike."""
        more, self._more, self._lines = self._more, {}, Counter()
        await self._write(list(more.values()))

    async def _write(self, entries: Sequence[AuditEntry]) -> None:
        if not entries:
            return
        try:
            async with self._store.begin() as session:
                for entry in entries:
                    append(session, entry)
        except (SQLAlchemyError, OSError) as error:
            log.warning("%d refusals are not in the audit log: %s", sum(each.num_requests for each in entries), error)


def _belongs(request: Request, error: ApiError) -> bool:
    """To read what is not there is everyday, and so is a mistake in a body."""
    if isinstance(error, Unauthorized | Forbidden):
        return True
    return request.method not in READING and isinstance(error, NotFound | OverQuota)


def _entry(request: Request, caller: Caller, error: ApiError) -> AuditEntry:
    named = next(reversed(request.path_params.values()), None)
    return AuditEntry(
        project_id=caller.project_id,
        key_id=caller.key_id,
        request_id=request.state.request_id,
        action=f"{request.method} {request.scope['route'].path}",
        object_id=named and storable(str(named))[:LONGEST_NAME],
        status=error.status,
        code=error.code,
        num_requests=1,
    )

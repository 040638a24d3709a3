"""Writes refused requests to the audit log, for example for a missing scope (permission), an unknown object or an
exceeded limit.

Only the first refusals of a key in a minute get an entry each, so that nobody can fill the log. Further refusals are
counted, and at the end of the minute one entry is written for all refusals with the same key, action, status and code.
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

ENTRIES = 10  # the most single entries for a key in a minute, in each control plane
MINUTE_SECONDS = 60.0
LONGEST_NAME = 100  # the most characters of an object id from a path; the object need not exist
READING = ("GET", "HEAD")


class Refusals:
    """Records refused requests in the audit log. Every control plane has one object of this class, for its own
    requests."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._written: Counter[str] = Counter()  # entries written in this minute, by key
        self._more: dict[tuple[str, str, int, str | None], AuditEntry] = {}  # counted, by key, action, status, code

    async def note(self, request: Request, error: ApiError) -> None:
        """Writes the refused request to the audit log. If the request's API key has had many refusals in this minute
        already, only counts the request.

        Does nothing for errors that do not belong in the log, such as a mistake in the request's body.
        """
        caller: Caller | None = getattr(request.state, "caller", None)
        if caller is None or not _belongs(request, error):
            return
        entry = _entry(request, caller, error)
        self._written[caller.key_id] += 1
        if self._written[caller.key_id] <= ENTRIES:
            await self._write([entry])
            return
        kind = (entry.key_id, entry.action, entry.status, entry.code)
        if kind in self._more:
            self._more[kind].num_requests += 1
        else:
            entry.object_id = None  # each refusal may name another object
            self._more[kind] = entry

    async def run(self) -> None:
        """Calls `end_minute` every minute, which writes audit entries for the refusals that were only counted.

        Runs until cancelled; then writes the entries for the last refusals.
        """
        try:
            while True:
                await asyncio.sleep(MINUTE_SECONDS)
                await self.end_minute()
        finally:
            await self.end_minute()

    async def end_minute(self) -> None:
        """Writes the audit entries for the refusals of the last minute that were only counted, and resets the counts.

        Refusals with the same key, action, status and code share one entry, which holds their number.
        """
        more, self._more, self._written = self._more, {}, Counter()
        await self._write(list(more.values()))

    async def _write(self, entries: Sequence[AuditEntry]) -> None:
        if not entries:
            return
        try:
            async with self._store.begin() as session:
                for entry in entries:
                    append(session, entry)
        except (SQLAlchemyError, OSError) as error:
            log.warning(
                "%d refused requests could not be written into the audit log: %s",
                sum(each.num_requests for each in entries),
                error,
            )


def _belongs(request: Request, error: ApiError) -> bool:
    """Whether a refused request belongs in the audit log.

    Reads of objects that do not exist, and mistakes in a body, do not belong there, because they are common.
    """
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

"""Advances sweeps in the background. Every control plane does so.

To look at a sweep, a control plane takes its lease. It does what can be done now, and gives the lease up until the
sweep is looked at again.
"""

import logging
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import ApiError
from services.control_plane.core.leases import RETRY_SECONDS, Later, told
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Sweep
from services.control_plane.jobs.jobs import Stale
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from services.control_plane.sweeps import sweeps

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0  # how often a sweep is looked at
LONGEST_REST_SECONDS = 60.0  # while it waits, for example for a quota; doubles from TICK_SECONDS on
GIVEN_UP_AFTER = timedelta(days=1)  # of unexpected errors, without going on in between


class SweepRunner:
    """The background work on sweeps. A piece of it is one look at a sweep."""

    at_once = 16

    def __init__(self, store: Store, settings: Settings, ray_api: RayApi) -> None:
        self._store, self._settings, self._ray_api = store, settings, ray_api
        self._rests: dict[str, float] = {}  # after the last look at a sweep that waits, in seconds, by the sweep's id

    def lease_of(self, sweep: Sweep) -> str:
        return sweeps.lease_of(sweep)

    async def claim(self, session: AsyncSession, holder: str) -> Sweep | None:
        return await sweeps.claim(session, holder)

    async def goes_on(self, session: AsyncSession, sweep: Sweep) -> bool:
        return await sweeps.is_running(session, sweep)

    async def interrupted(self, session: AsyncSession, sweep: Sweep, error: Exception) -> None:
        """Stores for the user that the sweep waits after an unexpected error. If these errors go on for a day, the
        sweep fails.
        """
        found = await sweeps.lock(session, sweep.id)
        if found.state != "running":
            return
        now = await session.scalar(select(func.clock_timestamp()))
        assert now is not None
        found.troubled_at = found.troubled_at or now
        if now - found.troubled_at > GIVEN_UP_AFTER:
            await sweeps.fail(session, found, ApiError(f"{told(error)}; ask the operator.", code="sweep_stalled"))
        else:
            found.waits_for = f"{told(error)}; it tries again every {RETRY_SECONDS:g} s."

    async def work(self, sweep: Sweep) -> None:
        last = self._rests.pop(sweep.id, TICK_SECONDS / 2)
        try:
            async with self._store.begin_for(sweep.project_id) as session:
                found = await sweeps.advance(session, sweep.id, self._settings, self._ray_api)
        except Stale as error:  # a job has changed meanwhile; the next look decides anew
            log.info("The sweep %s is looked at again: %s", sweep.id, error)
            raise Later(TICK_SECONDS) from None
        if found is None or found.state != "running":
            return
        if found.waits_for is None:
            raise Later(TICK_SECONDS)
        self._rests[sweep.id] = min(2 * last, LONGEST_REST_SECONDS)
        raise Later(self._rests[sweep.id])

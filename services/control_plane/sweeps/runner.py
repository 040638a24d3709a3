"""Advances sweeps (sets of jobs that differ in chosen options) in the background, in every control plane.

To work on a sweep, a control plane takes the sweep's lease, which is the right to work on the sweep. The control plane
does everything that can be done for the sweep now, such as submitting jobs, and gives up the lease. It works on the
sweep again a second or more later.
"""

import logging

from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import ApiError
from services.control_plane.core.leases import Later, Rests, lasts_too_long, told
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Sweep
from services.control_plane.jobs.jobs import Stale
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from services.control_plane.sweeps import sweeps

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0  # how often a sweep is looked at


class SweepRunner:
    """The background work on sweeps. The work comes in pieces: in one piece, a control plane does everything that can
    be done for one sweep at that moment.
    """

    at_once = 16

    def __init__(self, store: Store, settings: Settings, ray_api: RayApi) -> None:
        self._store, self._settings, self._ray_api = store, settings, ray_api
        self._rests = Rests(TICK_SECONDS)  # between looks at a sweep that waits, for example for a quota, by its id

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
        self._rests.forget(sweep.id)
        found = await sweeps.lock(session, sweep.id)
        if found.state == "running" and await lasts_too_long(session, found, error):
            await sweeps.fail(session, found, ApiError(f"{told(error)}; ask the operator.", code="sweep_stalled"))

    async def work(self, sweep: Sweep) -> None:
        try:
            async with self._store.begin_for(sweep.project_id) as session:
                found = await sweeps.advance(session, sweep.id, self._settings, self._ray_api)
        except Stale as error:  # a job has changed meanwhile; the next look decides anew
            log.info("The sweep %s is looked at again: %s", sweep.id, error)
            self._rests.forget(sweep.id)
            raise Later(TICK_SECONDS) from None
        if found is not None and found.state == "running" and found.waits_for is not None:
            raise Later(self._rests.after_refusal(sweep.id))
        self._rests.forget(sweep.id)
        if found is not None and found.state == "running":
            raise Later(TICK_SECONDS)

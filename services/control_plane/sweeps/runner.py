"""Advances sweeps in the background: once a second, every control plane looks at each sweep that has not ended."""

import asyncio
import logging
import time

from sqlalchemy.exc import SQLAlchemyError

from services.control_plane.core.store import Store
from services.control_plane.jobs.jobs import Stale
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from services.control_plane.sweeps import sweeps

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
RETRY_SECONDS = 30.0  # after an error that nobody expected


class SweepRunner:
    """The background task that advances sweeps. Every control plane runs one. A lock on a sweep's row ensures that only
    one control plane changes the sweep at a time.
    """

    def __init__(self, store: Store, settings: Settings, ray_api: RayApi) -> None:
        self._store, self._settings, self._ray_api = store, settings, ray_api
        self._resting: dict[str, float] = {}  # sweeps with an error, and when they are looked at again

    async def run(self) -> None:
        """Advances all sweeps once a second, until cancelled."""
        while True:
            try:
                async with self._store.begin() as session:
                    live = await sweeps.live(session)
            except (SQLAlchemyError, OSError) as error:
                log.warning("The database does not answer, so sweeps wait: %s", error)
                live = []
            for sweep_id, project_id in live:
                if time.monotonic() >= self._resting.get(sweep_id, 0.0):
                    await self._advance(sweep_id, project_id)
            await asyncio.sleep(TICK_SECONDS)

    async def _advance(self, sweep_id: str, project_id: str) -> None:
        try:
            async with self._store.begin_for(project_id) as session:
                await sweeps.advance(session, sweep_id, self._settings, self._ray_api)
        except Stale as error:  # a job has changed meanwhile; the next look decides anew
            log.info("The sweep %s is looked at again: %s", sweep_id, error)
        except Exception as error:  # an error with one sweep must not stop the others
            log.warning("The sweep %s was interrupted and goes on in %d s: %r", sweep_id, RETRY_SECONDS, error)
            self._resting[sweep_id] = time.monotonic() + RETRY_SECONDS
        else:
            self._resting.pop(sweep_id, None)

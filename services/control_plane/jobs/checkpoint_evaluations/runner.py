"""Works in the background on the evaluations that jobs ask for. Every control plane does so.

To create such an evaluation, or to note how it has ended, a control plane takes its lease, which is the right to work
on it.
"""

from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import ApiError
from services.control_plane.core.leases import Later, Rests
from services.control_plane.core.store import ProjectStore, Store
from services.control_plane.core.tables import Job, JobEvaluation
from services.control_plane.evaluations.of_jobs import body_of, rows_of
from services.control_plane.jobs.checkpoint_evaluations import checkpoint_evaluations
from services.control_plane.settings import Settings

TICK_SECONDS = 1.0  # from the first refusal to the next try


class JobEvaluationRunner:
    """The background work on the evaluations that jobs ask for. The work comes in pieces: one evaluation that is to be
    created, or that has ended.
    """

    at_once = 4

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._rests = Rests(TICK_SECONDS)  # between tries to create an evaluation that a quota refuses

    def lease_of(self, row: JobEvaluation) -> str:
        return checkpoint_evaluations.lease_of(row)

    async def claim(self, session: AsyncSession, holder: str) -> JobEvaluation | None:
        return await checkpoint_evaluations.claim(session, holder)

    async def goes_on(self, session: AsyncSession, row: JobEvaluation) -> bool:
        return await checkpoint_evaluations.is_live(session, row)

    async def interrupted(self, session: AsyncSession, row: JobEvaluation, error: Exception) -> None:
        """Stores for the user that the evaluation waits after an unexpected error. If these errors go on for a day, it
        fails.
        """
        self._rests.forget(row.id)
        await checkpoint_evaluations.interrupt(session, row.id, error)

    async def work(self, row: JobEvaluation) -> None:
        store = ProjectStore(self._store, row.project_id)
        try:
            rows = await self._rows(store, row)
        except ApiError as error:  # the file was deleted
            async with store.begin() as session:
                await checkpoint_evaluations.refuse(session, row.id, error)
            return
        async with store.begin() as session:
            found = await checkpoint_evaluations.advance(session, self._settings, row.id, rows)
        if found.waits_for is not None:
            raise Later(self._rests.after_refusal(row.id))
        self._rests.forget(row.id)

    async def _rows(self, store: ProjectStore, row: JobEvaluation) -> list[dict[str, object]]:
        """Returns the prompts of the evaluation. Returns none if it is created already, or never will be."""
        async with store.look() as session:
            job = await session.get_one(Job, row.job_id)
        if row.state != "waiting" or job.observed == "cancelled":
            return []
        return await rows_of(store, body_of(job.spec["evaluations"][row.name], row.model_id))

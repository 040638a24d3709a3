"""Reads jobs by their ids for clients that poll. Requests that arrive at the same time share one query."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from sqlalchemy import ARRAY, Text, any_, literal, select

from services.control_plane.core.batching import Batcher
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Job
from services.control_plane.jobs.checkpoint_evaluations import checkpoint_evaluations
from services.control_plane.jobs.jobs import not_found

Found = tuple[Job, Sequence[dict[str, Any]]]
"""A job, and the evaluations that it has asked for, as JSON objects."""


class JobReader:
    """Reads jobs for all requests of this process. Each project has at most one query running at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._projects: dict[str, Batcher[Found]] = {}

    async def job(self, project_id: str, job_id: str) -> Found:
        """Returns the job with this id in the project, with its evaluations. Raises NotFound if there is no
        such job."""
        if project_id not in self._projects:
            self._projects[project_id] = Batcher(partial(self._find, project_id))
        if (found := await self._projects[project_id].get(job_id)) is None:
            raise not_found(job_id)
        return found

    async def _find(self, project_id: str, job_ids: list[str]) -> dict[str, Found]:
        async with self._store.look_for(project_id) as session:
            query = select(Job).where(Job.id == any_(literal(job_ids, ARRAY(Text()))))
            jobs = list(await session.scalars(query))
            evaluations = await checkpoint_evaluations.of_jobs(session, jobs)
        return {job.id: (job, evaluations.get(job.id, ())) for job in jobs}

"""Jobs by their ids, as clients that poll ask for them: who asks at the same moment shares a statement."""

import asyncio

from sqlalchemy import ARRAY, Text, any_, literal, select

from services.control_plane.jobs import not_found
from services.control_plane.store import Store
from services.control_plane.tables import Job

Asked = dict[str, asyncio.Future[Job | None]]  # by job id


class Lookups:
    """Of one process.

    One statement of a project runs at a time. Who comes meanwhile waits for the next one, which sees all that was
    committed before he asked.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._asked: dict[str, Asked] = {}  # by project, of those that are being read for
        self._tasks: set[asyncio.Task[None]] = set()

    async def job(self, project_id: str, job_id: str) -> Job:
        """Raises NotFound."""
        asked = self._asked.get(project_id)
        if asked is None:
            asked = self._asked[project_id] = {}
            task = asyncio.create_task(self._read(project_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if job_id not in asked:
            asked[job_id] = asyncio.get_running_loop().create_future()
        job = await asyncio.shield(asked[job_id])  # others may wait for it
        if job is None:
            raise not_found(job_id)
        return job

    async def _read(self, project_id: str) -> None:
        """Until nobody asks."""
        while asked := self._asked[project_id]:
            self._asked[project_id] = {}
            try:
                found = await self._find(project_id, list(asked))
            except Exception as error:
                for future in asked.values():
                    future.set_exception(error)
            else:
                for job_id, future in asked.items():
                    future.set_result(found.get(job_id))
        del self._asked[project_id]

    async def _find(self, project_id: str, job_ids: list[str]) -> dict[str, Job]:
        async with self._store.look_for(project_id) as session:
            query = select(Job).where(Job.id == any_(literal(job_ids, ARRAY(Text()))))
            return {job.id: job for job in await session.scalars(query)}

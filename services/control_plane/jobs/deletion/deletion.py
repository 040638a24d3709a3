"""Marks jobs that have ended as deleted, with their result files and, if the user wants it, their models.

No request sees a job that is marked as deleted. The regular cleanup (module `clearing`) then removes the job's files
and rows.
"""

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.tables import TERMINAL, File, Job, Model, Rounds, SweepTrial
from services.control_plane.jobs import jobs
from services.control_plane.jobs.checkpoint_evaluations import checkpoint_evaluations
from services.control_plane.models import deletion
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings


async def remove(
    session: AsyncSession, settings: Settings, job_id: str, *, with_models: bool
) -> tuple[list[NamedModel], list[str]]:
    """Marks the job as deleted, with its result file. Cancels the evaluations that the job asked for and that have not
    ended. If `with_models` is true, also marks its policy and the models of its checkpoints. Returns the models that
    were marked, and the ids of those that stay.

    Raises NotFound if there is no such job. Raises InvalidRequest if the job has not ended, or belongs to a sweep or to
    a set of rounds (repeated training of a policy), or if a model to mark is still needed. The caller must remove the
    files of the models after the commit.
    """
    job = await session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise jobs.not_found(job_id)
    if job.observed not in TERMINAL:
        raise InvalidRequest(f"The job {job_id} is {job.observed}; cancel it before you delete it.")
    await _refuse_part(session, job_id)
    await checkpoint_evaluations.cancel_all(session, job_id)
    model_ids = select(Model.id).where(Model.job_id == job_id, Model.deleted_at.is_(None)).order_by(Model.id)
    stay = list(await session.scalars(model_ids))
    removed = [await deletion.delete(session, settings, model_id) for model_id in stay if with_models]
    result_file = update(File).where(File.id == job.result_file, File.deleted_at.is_(None))
    await session.execute(result_file.values(deleted_at=func.clock_timestamp()))
    job.deleted_at, job.cleared_at = func.now(), None
    return removed, [] if with_models else stay


async def _refuse_part(session: AsyncSession, job_id: str) -> None:
    """Raises InvalidRequest if the job belongs to a sweep or to a set of rounds (repeated training of a policy)."""
    of_sweep = select(SweepTrial.sweep_id).where(SweepTrial.job_id == job_id)
    of_rounds = select(Rounds.id).where(Rounds.history.contains([{"job": job_id}]))
    for what, query in (("sweep", of_sweep), ("rounds", of_rounds)):
        if (owner := await session.scalar(query.limit(1))) is not None:
            message = f"The job {job_id} belongs to the {what} {owner}; delete the {what} first."
            raise InvalidRequest(message)

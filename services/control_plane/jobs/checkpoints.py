"""Lists a job's checkpoints, and drops those that the job does not keep."""

from sqlalchemy import Select, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core import checkpoint_selection
from services.contract import JobSpec
from services.control_plane.core.tables import Checkpoint, Event, Job, Model
from services.control_plane.jobs import jobs
from services.control_plane.models import models


def offered(job_id: str) -> Select[Checkpoint]:
    """Returns the query for the job's checkpoints whose models were neither deleted nor dropped."""
    query = select(Checkpoint).join(Model, Model.id == Checkpoint.model_id)
    return query.where(Checkpoint.job_id == job_id, Model.deleted_at.is_(None))


async def drop_old(session: AsyncSession, job: Job) -> None:
    """Drops the checkpoints that the job does not keep and nobody uses. The sweeper deletes their files.

    Call this function when a newer checkpoint is complete. The caller must hold the job's lock. A checkpoint that is in
    use now may be dropped at a later call.
    """
    spec = JobSpec.model_validate(job.spec)
    metric, keep = spec.config.best_metric, spec.keep_checkpoints
    rows = {row.step: row for row in await session.scalars(offered(job.id))}
    found = checkpoint_selection.evaluations(((step, row.metrics) for step, row in rows.items()), metric)
    old = rows.keys() - checkpoint_selection.kept(rows, found, metric, keep)
    if not old:
        return
    dropped = await models.withdraw_unused(session, [rows[step].model_id for step in old])
    for step in sorted(step for step in old if rows[step].model_id in dropped):
        message = f"Checkpoint of step {step} removed, because keep_checkpoints is {keep}: {rows[step].model_id}"
        event = insert(Event).values(public_id=jobs.new_event_id(), job_id=job.id, message=message)
        await session.execute(event)  # not with `append`, because a savepoint around the report may be rolled back

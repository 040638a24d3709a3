"""Lists the checkpoints that a job offers as models, and drops old checkpoints that the job's options do not keep."""

from sqlalchemy import Select, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core import checkpoint_selection
from services.contract import JobSpec
from services.control_plane.core.tables import Checkpoint, Event, Job, Model
from services.control_plane.jobs import jobs
from services.control_plane.models import models


def offered(job_id: str) -> Select[Checkpoint]:
    """Returns the SQL query for those checkpoints of the job whose models still exist."""
    query = select(Checkpoint).join(Model, Model.id == Checkpoint.model_id)
    return query.where(Checkpoint.job_id == job_id, Model.deleted_at.is_(None))


async def drop_old(session: AsyncSession, job: Job) -> None:
    """Marks old checkpoints of the job as deleted, if `keep_checkpoints` does not keep them and nobody uses their
    models.

    The regular cleanup deletes their files later. Call this function when a newer checkpoint is complete. The caller
    must hold the lock of the job's row. A checkpoint that is in use now may be dropped by a later call.
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
        await session.execute(event)  # not with `append`: the savepoint of this report may be rolled back

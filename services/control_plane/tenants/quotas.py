"""Computes how much each project uses, and refuses requests that would exceed a project's limits.

The usage is summed up while the project's row is locked, so that simultaneous requests cannot exceed a limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Select, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import Forbidden, OverQuota
from services.control_plane.core.store import project_of
from services.control_plane.core.tables import JOB_STATES, Attempt, Feedback, File, Job, Project, Upload
from services.control_plane.tenants import projects

HOURS = func.extract("epoch", func.coalesce(Attempt.ended_at, func.now()) - Attempt.created_at) / 3600
WAITING = ("queued", "paused")  # states that count against max_queued_jobs
SHARED_OVER = timedelta(days=1)  # the time over which projects' worker hours are compared


@dataclass(frozen=True)
class Share:
    """A project's weight, its limit on running jobs and its recent use of workers, which decide when its next job
    starts.
    """

    max_running_jobs: int | None = None  # None: no limit
    weight: float = 1.0
    worker_hours: float = 0.0  # workers times hours of the project's attempts in the last day


@dataclass(frozen=True)
class Usage:
    """The bytes, jobs and accelerator hours that one project uses."""

    num_bytes: int
    jobs: dict[str, int]  # by state
    accelerator_hours: float


async def usage(session: AsyncSession) -> Usage:
    """Returns how many bytes, jobs and accelerator hours the session's project uses."""
    counts = await session.execute(select(Job.observed, func.count()).group_by(Job.observed))
    jobs = dict.fromkeys(JOB_STATES, 0) | dict(counts.all())
    return Usage(
        await num_bytes(session, project_of(session)), jobs, await _accelerator_hours(session, project_of(session))
    )


async def admit_job(session: AsyncSession) -> None:
    """Raises OverQuota if the project for which `session` was opened may not submit another job now. Raises Forbidden
    if this project is archived."""
    await _admit(session, project_of(session), WAITING)


async def admit_resumption(session: AsyncSession, project_id: str) -> None:
    """Raises OverQuota if the project may not queue a paused job again now, because the project has reached its limit
    on jobs or on accelerator hours.

    The project's queued jobs count against the limit on jobs. Its paused jobs do not count here, although they count
    when a new job is submitted.
    """
    await _admit(session, project_id, ("queued",))


async def _admit(session: AsyncSession, project_id: str, counted: Sequence[str]) -> None:
    project = await session.get_one(Project, project_id)
    # Locked until the job is stored, so that nobody archives the project meanwhile.
    if project.max_queued_jobs is None and project.max_accelerator_hours is None:
        await session.refresh(project, with_for_update={"read": True})
    else:
        project = await projects.lock(session, project.id)  # so that no two submissions count at the same time
    if project.archived_at is not None:  # the project was archived after the key was looked up
        raise Forbidden(
            f"The project {project.id} of your key is archived; use a key of another project.", code="project_archived"
        )
    if project.max_queued_jobs is not None:
        of_project = select(func.count()).select_from(Job).where(Job.project_id == project.id)
        waiting = await session.scalar(of_project.where(Job.observed.in_(counted))) or 0
        if waiting >= project.max_queued_jobs:
            remedy = "wait for a job to start, cancel one, or ask an admin to raise max_queued_jobs"
            what = f"{waiting} {' and '.join(counted)} jobs, and the limit is {project.max_queued_jobs}"
            raise OverQuota(f"The project has {what}; {remedy}.")
    if project.max_accelerator_hours is not None:
        used = await _accelerator_hours(session, project.id)
        if used >= (limit := project.max_accelerator_hours):
            remedy = "ask an admin to raise max_accelerator_hours"
            raise OverQuota(f"The project has used {used:.2f} of at most {limit:g} accelerator hours; {remedy}.")


async def shares(session: AsyncSession) -> dict[str, Share]:
    """Returns the weight of each project, its limit on running jobs, and its worker hours in the last day, by project
    id.
    """
    since = func.now() - SHARED_OVER
    hours = func.extract(
        "epoch", func.coalesce(Attempt.ended_at, func.now()) - func.greatest(Attempt.created_at, since)
    )
    used = select(Job.project_id, func.sum(Job.spec["num_workers"].as_integer() * hours / 3600).label("worker_hours"))
    used = used.join(Attempt).where(or_(Attempt.ended_at.is_(None), Attempt.ended_at > since)).group_by(Job.project_id)
    recent = used.subquery()
    query = select(Project.id, Project.max_running_jobs, Project.weight, recent.c.worker_hours)
    rows = await session.execute(query.outerjoin(recent, recent.c.project_id == Project.id))
    return {row.id: Share(row.max_running_jobs, row.weight, float(row.worker_hours or 0)) for row in rows}


async def out_of_hours(session: AsyncSession) -> dict[str, str]:
    """Returns a text for each project that has used up its accelerator hours, by project id.

    The text goes into the column `waits_for` of the project's jobs, which says what a job waits for.
    """
    open_hours = _open_hours().group_by(Job.project_id).subquery()
    used = Project.accelerator_hours + func.coalesce(open_hours.c.hours, 0)
    query = select(Project.id, used, Project.max_accelerator_hours).where(Project.max_accelerator_hours.is_not(None))
    rows = await session.execute(query.outerjoin(open_hours, open_hours.c.project_id == Project.id))
    return {
        project_id: (
            f"accelerator hours, because its project has used all {limit:g}; an admin can raise max_accelerator_hours"
        )
        for project_id, hours, limit in rows
        if limit is not None and hours >= limit
    }


async def num_bytes(session: AsyncSession, project_id: str) -> int:
    """Returns the number of bytes of the project's files, of its uploads that are not complete, and of its votes."""
    files = select(func.sum(File.num_bytes)).where(File.project_id == project_id, File.alive())
    uploads = select(func.sum(Upload.num_bytes)).where(Upload.project_id == project_id, Upload.state == "pending")
    votes = select(func.sum(Feedback.num_bytes)).where(Feedback.project_id == project_id)
    return sum([int(await session.scalar(query) or 0) for query in (files, uploads, votes)])


async def count_hours(session: AsyncSession, attempt: Attempt) -> None:
    """Adds the accelerator hours of an attempt (run of a job on Ray) that has just ended to the sum of the job's
    project.

    The sum is kept in the project's row, so that no query must read all attempts that ever ended.
    """
    if attempt.num_accelerators:
        hours = select(Attempt.num_accelerators * HOURS)
        hours = hours.where(Attempt.job_id == attempt.job_id, Attempt.number == attempt.number)
        project = select(Job.project_id).where(Job.id == attempt.job_id)
        total = Project.accelerator_hours + hours.scalar_subquery()
        await session.execute(
            update(Project).where(Project.id == project.scalar_subquery()).values(accelerator_hours=total)
        )


async def _accelerator_hours(session: AsyncSession, project_id: str) -> float:
    ended = await session.scalar(select(Project.accelerator_hours).where(Project.id == project_id)) or 0
    row = (await session.execute(_open_hours().where(Job.project_id == project_id).group_by(Job.project_id))).first()
    return ended + float(row.hours if row else 0)


def _open_hours() -> Select[str, float]:
    """Returns an SQL query that sums up the accelerator hours of attempts (runs of jobs) that have not ended. Its
    columns are the project's id and the sum.

    The query has no GROUP BY; the caller must add one, by the project's id.
    """
    hours = func.sum(Attempt.num_accelerators * HOURS).label("hours")
    return select(Job.project_id, hours).join(Attempt).where(Attempt.state != "ended")

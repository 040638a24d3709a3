"""Creates, finds, changes and archives projects. A project owns files, jobs, models and API keys."""

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.auth.keys import Caller
from services.control_plane.core.errors import Forbidden, InvalidRequest, NotFound
from services.control_plane.core.tables import (
    DEFAULT_PROJECT,
    EVALUATION_ENDS,
    TERMINAL,
    Evaluation,
    Job,
    Project,
    Rounds,
    Sweep,
)


def managed_by(caller: Caller) -> Select[Project]:
    """Returns the SQL query for the projects that the caller may manage. An admin of the default project may manage all
    projects, any other caller only its own.
    """
    every = select(Project).where(Project.deleted_at.is_(None))
    return every if caller.manages_all else every.where(Project.id == caller.project_id)


async def find(session: AsyncSession, caller: Caller, project_id: str) -> Project:
    project = await session.scalar(managed_by(caller).where(Project.id == project_id))
    if project is None:
        raise NotFound(
            f"There is no project with the id '{project_id}' that your key manages; list the projects for their ids.",
            param="project_id",
            code="project_not_found",
        )
    return project


async def find_to_use(session: AsyncSession, caller: Caller, project_id: str) -> Project:
    """Returns the project with this id. Raises NotFound if the caller does not manage the project, and InvalidRequest
    if the project is archived.
    """
    project = await find(session, caller, project_id)
    if project.archived_at is not None:
        raise InvalidRequest(f"The project {project_id} is archived; use another project.", param="project_id")
    return project


async def find_to_change(session: AsyncSession, caller: Caller, project_id: str) -> Project:
    """Returns the project with this id, locked until the transaction ends.

    Raises Forbidden if the caller is not an admin of the default project, NotFound if there is no such project, and
    InvalidRequest if the project is archived.
    """
    project = await find_to_use(session, caller, project_id)
    check_manages_all(caller)
    return await lock(session, project.id)


def check_manages_all(caller: Caller) -> None:
    """Raises Forbidden unless the caller belongs to the default project, whose admins manage all projects."""
    if not caller.manages_all:
        message = (
            "Only an admin key of the default project may change projects, but your key belongs to the project "
            f"{caller.project_id}; ask an admin of the default project."
        )
        raise Forbidden(message, code="insufficient_permissions")


async def lock(session: AsyncSession, project_id: str) -> Project:
    """Locks the project's row and returns the current row.

    Until the transaction ends, no other transaction can add objects that count against the project's limits.
    """
    return await session.get_one(Project, project_id, with_for_update={"key_share": True}, populate_existing=True)


async def create(session: AsyncSession, caller: Caller, values: Mapping[str, Any]) -> Project:
    check_manages_all(caller)
    project = Project(id=f"proj_{secrets.token_hex(12)}")
    session.add(project)
    return await _write(session, project, values)


async def update(session: AsyncSession, caller: Caller, project_id: str, values: Mapping[str, Any]) -> Project:
    return await _write(session, await find_to_change(session, caller, project_id), values)


async def _write(session: AsyncSession, project: Project, values: Mapping[str, Any]) -> Project:
    for name, value in values.items():
        setattr(project, name, value)
    try:
        await session.flush()
    except IntegrityError:  # names are unique
        message = f"A project with the name '{project.name}' exists already; choose another name."
        raise InvalidRequest(message, param="name") from None
    await session.refresh(project)
    return project


async def archive(session: AsyncSession, caller: Caller, project_id: str) -> Project:
    """Archives the project, and returns it. Its keys stop working, but its files, jobs and models stay.

    Raises InvalidRequest for the default project. Also raises InvalidRequest if one of these of the project has not
    ended: a job, an evaluation, a sweep, or a set of rounds (repeated training of a policy).
    """
    if project_id == DEFAULT_PROJECT:
        raise InvalidRequest(
            "The default project cannot be archived, because the service's configured key belongs to it; "
            "archive another project.",
            param="project_id",
        )
    project = await find_to_change(session, caller, project_id)
    jobs = Job.__table__  # through the mapped class, the session would see its own project's jobs only
    living = select(func.count()).where(jobs.c.project_id == project_id, jobs.c.observed.not_in(TERMINAL))
    if count := await session.scalar(living):
        raise InvalidRequest(f"The project {project_id} has {count} jobs that have not ended; cancel these jobs first.")
    for kind, name in ((Evaluation, "evaluations"), (Sweep, "sweeps"), (Rounds, "rounds")):
        rows = kind.__table__.c
        running = select(func.count()).where(rows.project_id == project_id, rows.state.not_in(EVALUATION_ENDS))
        if count := await session.scalar(running):
            message = f"The project {project_id} has {count} {name} that have not ended; cancel these first."
            raise InvalidRequest(message)
    project.archived_at = datetime.now(UTC)
    return project


async def remove(session: AsyncSession, caller: Caller, project_id: str) -> None:
    """Marks an archived project as deleted. Its name is free for another project from then on.

    The regular cleanup then erases everything that the project owns. Raises InvalidRequest if the project is not
    archived, and Forbidden if the caller is not an admin of the default project.
    """
    await find(session, caller, project_id)
    check_manages_all(caller)
    project = await lock(session, project_id)
    if project.archived_at is None:
        message = f"The project {project_id} is not archived; archive it before you delete it."
        raise InvalidRequest(message, param="project_id")
    project.deleted_at, project.name = project.deleted_at or datetime.now(UTC), project_id

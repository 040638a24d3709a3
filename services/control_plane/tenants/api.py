"""The routes below /v1/x/projects, which create, list, change and archive projects."""

from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.documents import Page, answers
from services.control_plane.core.responses import deleted, listing
from services.control_plane.core.store import page
from services.control_plane.core.tables import Project
from services.control_plane.http.dependencies import CallerPart, IdempotentPart, Limit, StorePart
from services.control_plane.tenants import projects, quotas
from services.control_plane.tenants.documents import ProjectDocument, ProjectUsageDocument
from services.control_plane.tenants.requests import CreateProject, UpdateProject
from services.control_plane.tenants.responses import project_object, usage_object

router = APIRouter(prefix="/x/projects")


@router.post("", responses=answers(ProjectDocument))
async def create(idempotent: IdempotentPart, caller: CallerPart, body: CreateProject) -> Response:
    async def make(session: AsyncSession) -> dict[str, Any]:
        return project_object(await projects.create(session, caller, body.model_dump()))

    return await idempotent.act(make)


@router.get("", responses=answers(Page[ProjectDocument]))
async def list_projects(
    store: StorePart,
    caller: CallerPart,
    after: str | None = None,
    limit: Limit = 20,
) -> dict[str, Any]:
    """Lists the projects that the caller manages, including archived ones, newest first."""
    keys, query = [Project.created_at, Project.id], projects.managed_by(caller)
    async with store.look() as session:
        rows, more = await page(session, query, keys, after=after, limit=limit)
    return listing([project_object(row) for row in rows], more)


@router.get("/{project_id}", responses=answers(ProjectDocument))
async def retrieve(store: StorePart, caller: CallerPart, project_id: str) -> dict[str, Any]:
    async with store.look() as session:
        return project_object(await projects.find(session, caller, project_id))


@router.get("/{project_id}/usage", responses=answers(ProjectUsageDocument))
async def usage(store: StorePart, caller: CallerPart, project_id: str) -> dict[str, Any]:
    async with store.look() as session:
        project = await projects.find(session, caller, project_id)
    async with store.store.look_for(project.id) as session:
        return usage_object(project, await quotas.usage(session))


@router.post("/{project_id}", responses=answers(ProjectDocument))
async def update(idempotent: IdempotentPart, caller: CallerPart, project_id: str, body: UpdateProject) -> Response:
    """Changes the fields of the project that the body contains. A limit of null means no limit."""

    async def change(session: AsyncSession) -> dict[str, Any]:
        values = body.model_dump(exclude_unset=True)
        return project_object(await projects.update(session, caller, project_id, values))

    return await idempotent.act(change, changes=project_id)


@router.post("/{project_id}/archive", responses=answers(ProjectDocument))
async def archive(idempotent: IdempotentPart, caller: CallerPart, project_id: str) -> Response:
    """Archives a project. The project's keys stop working within a second."""

    async def act(session: AsyncSession) -> dict[str, Any]:
        return project_object(await projects.archive(session, caller, project_id))

    return await idempotent.act(act, changes=project_id)


@router.delete("/{project_id}")
async def delete(idempotent: IdempotentPart, caller: CallerPart, project_id: str) -> Response:
    """Deletes an archived project, with everything that it owns."""

    async def remove(session: AsyncSession) -> dict[str, Any]:
        await projects.remove(session, caller, project_id)
        return deleted("project", project_id)

    return await idempotent.act(remove, changes=project_id)

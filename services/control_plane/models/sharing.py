"""Grants and revokes checkpoint permissions, by which a project shares a trained model with other projects.

The module `core.store` enforces the permissions: it hides models that are not shared with the session's project.
"""

import secrets
from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import InvalidRequest, NotFound
from services.control_plane.core.tables import CheckpointPermission, Model, Project


async def grant(session: AsyncSession, model: Model, project_ids: Sequence[str]) -> list[CheckpointPermission]:
    """Shares the model with the projects whose ids are in `project_ids`, and returns the permissions of these projects
    to use the model.

    Permissions that exist already do not change. Raises InvalidRequest for an unknown or archived project, and for the
    project that owns the model.
    """
    known = select(Project.id).where(Project.id.in_(project_ids), Project.archived_at.is_(None))
    if unknown := set(project_ids) - set(await session.scalars(known)):
        raise InvalidRequest(
            f"The field 'project_ids' contains '{min(unknown)}', which is not the id of an active project; send "
            "ids of active projects.",
            param="project_ids",
        )
    if model.project_id in project_ids:
        raise InvalidRequest(
            f"The field 'project_ids' contains {model.project_id}, the project that owns the model; send ids of "
            "other projects.",
            param="project_ids",
        )
    rows = [
        {"id": f"cp_{secrets.token_hex(12)}", "model_id": model.id, "project_id": name} for name in set(project_ids)
    ]
    await session.execute(insert(CheckpointPermission).values(rows).on_conflict_do_nothing())
    query = select(CheckpointPermission).where(CheckpointPermission.model_id == model.id)
    query = query.where(CheckpointPermission.project_id.in_(project_ids))
    return list(await session.scalars(query.order_by(CheckpointPermission.created_at, CheckpointPermission.id)))


async def revoke(session: AsyncSession, model: Model, permission_id: str) -> None:
    """Deletes a permission to use the model. Jobs that were submitted before continue. Raises NotFound if the model has
    no such permission."""
    row = delete(CheckpointPermission).where(CheckpointPermission.id == permission_id)
    row = row.where(CheckpointPermission.model_id == model.id)
    if (await session.execute(row.returning(CheckpointPermission.id))).first() is None:
        raise NotFound(
            f"The model '{model.id}' has no permission '{permission_id}'; list the model's permissions for their ids.",
            param="permission_id",
        )

"""The route /v1/x/audit, which lists the audit log: the requests that changed data or were refused."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import select

from services.control_plane.core.documents import answers
from services.control_plane.core.responses import listing
from services.control_plane.core.store import page
from services.control_plane.core.tables import AuditEntry
from services.control_plane.http.dependencies import CallerPart, Limit, StorePart
from services.control_plane.tenants.documents import AuditPage
from services.control_plane.tenants.responses import audit_object

router = APIRouter(prefix="/x/audit")


@router.get("", responses=answers(AuditPage))
async def list_entries(
    store: StorePart,
    caller: CallerPart,
    project_id: str | None = None,
    after: Annotated[int, Query(ge=1, lt=2**63)] | None = None,
    limit: Limit = 20,
) -> dict[str, Any]:
    """Lists the requests that changed data or were refused, newest first. If `project_id` is given, lists only the
    requests with keys of this project.
    """
    query = select(AuditEntry)
    if not caller.manages_all:
        query = query.where(AuditEntry.project_id == caller.project_id)
    if project_id is not None:
        query = query.where(AuditEntry.project_id == project_id)
    async with store.look() as session:
        rows, more = await page(session, query, [AuditEntry.id], after=after, limit=limit)
    return listing([audit_object(row) for row in rows], more)

"""Builds the JSON objects of the API for projects, API keys and entries of the audit log."""

from typing import Any

from services.control_plane.core.responses import seconds
from services.control_plane.core.tables import (
    AuditEntry,
    Key,
    Project,
)
from services.control_plane.tenants.quotas import WAITING, Usage

LIMITS = ("max_running_jobs", "max_queued_jobs", "max_bytes", "max_accelerator_hours")


def project_object(row: Project) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "project",
        "created_at": seconds(row.created_at),
        "name": row.name,
        "archived_at": seconds(row.archived_at),
        "weight": row.weight,
        **{limit: getattr(row, limit) for limit in LIMITS},
    }


def usage_object(project: Project, usage: Usage) -> dict[str, Any]:
    """Returns the API's JSON object of a project's usage: for each limit, how much is used. A limit of null means no
    limit."""
    waiting = sum(usage.jobs[state] for state in WAITING)
    used = (usage.jobs["running"], waiting, usage.num_bytes, round(usage.accelerator_hours, 6))
    return {
        "object": "project.usage",
        "project_id": project.id,
        "jobs": usage.jobs,
        "limits": {
            name: {"used": value, "limit": getattr(project, name)} for name, value in zip(LIMITS, used, strict=True)
        },
    }


def key_object(row: Key) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "key",
        "created_at": seconds(row.created_at),
        "name": row.name,
        "project_id": row.project_id,
        "redacted_value": f"rd-…{row.hint}",
        "scopes": row.scopes,
        "requests_per_minute": row.requests_per_minute,
        "tokens_per_minute": row.tokens_per_minute,
        "expires_at": seconds(row.expires_at),
        "revoked_at": seconds(row.revoked_at),
        "last_used_at": seconds(row.last_used_at),
    }


def audit_object(row: AuditEntry) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "audit.entry",
        "created_at": seconds(row.created_at),
        "project_id": row.project_id,
        "key_id": row.key_id,
        "request_id": row.request_id,
        "action": row.action,
        "object_id": row.object_id,
        "status": row.status,
        "code": row.code,
        "num_requests": row.num_requests,
    }

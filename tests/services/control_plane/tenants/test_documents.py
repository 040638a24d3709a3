"""Tests that the JSON of projects, keys, usage and the audit log is what the OpenAPI document describes."""

from datetime import date

from services.control_plane.core.responses import listing
from services.control_plane.core.tables import JOB_STATES, AuditEntry, Key, Project
from services.control_plane.tenants.documents import (
    AuditDocument,
    AuditPage,
    KeyDocument,
    NewKeyDocument,
    ProjectDocument,
    ProjectUsageDocument,
    UsageDocument,
)
from services.control_plane.tenants.quotas import Usage
from services.control_plane.tenants.responses import audit_object, key_object, project_object, usage_object
from services.control_plane.tenants.usage_api import _usage_object
from tests.services.control_plane.documented import check
from tests.services.control_plane.tenants.test_responses import AT, PROJECT


def test_projects_and_what_they_use_are_as_described() -> None:
    limits = {"max_running_jobs": 1, "max_queued_jobs": 2, "max_bytes": 3, "max_accelerator_hours": 1.5}
    for project in (PROJECT, Project(id="proj_2", created_at=AT, name="old", weight=1.0, archived_at=AT, **limits)):
        check(ProjectDocument, project_object(project))
        check(ProjectUsageDocument, usage_object(project, Usage(7, dict.fromkeys(JOB_STATES, 0), 0.25)))


def test_a_key_is_as_described_and_a_new_one_has_its_value_beside() -> None:
    key = Key(id="key_1", created_at=AT, name="ci", project_id="proj_1", hint="wxyz", scopes=["read", "admin"])
    check(KeyDocument, key_object(key))
    key.expires_at = key.revoked_at = key.last_used_at = AT
    key.requests_per_minute, key.tokens_per_minute = 5, 6
    for value in ("rd-value", None):
        check(NewKeyDocument, key_object(key) | {"value": value})


def test_usage_is_as_described() -> None:
    check(UsageDocument, _usage_object("day", date(2026, 1, 1), date(2026, 1, 2), ("2026-01-01", 1, 2, 3, 0.5)))


def test_entries_of_the_audit_log_have_numbers_as_ids() -> None:
    entry = AuditEntry(id=5, created_at=AT, project_id="proj_1", key_id="key_1", request_id="req_1", status=403)
    entry.action, entry.num_requests = "GET /v1/x/keys", 1
    check(AuditDocument, audit_object(entry))
    check(AuditPage, listing([audit_object(entry)], has_more=False))

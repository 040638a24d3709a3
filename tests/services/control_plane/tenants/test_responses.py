"""Tests the JSON of projects, their usage, API keys and entries of the audit log."""

from datetime import UTC, datetime

from services.control_plane.core.tables import AuditEntry, Key, Project
from services.control_plane.tenants.quotas import Usage
from services.control_plane.tenants.responses import audit_object, key_object, project_object, usage_object

AT = datetime(2026, 1, 2, tzinfo=UTC)
SECONDS = 1_767_312_000
PROJECT = Project(id="proj_1", created_at=AT, name="team", weight=2.0, max_queued_jobs=3, max_bytes=100)


def test_a_project_has_null_for_the_limits_that_it_lacks() -> None:
    assert project_object(PROJECT) == {
        "id": "proj_1",
        "object": "project",
        "created_at": SECONDS,
        "name": "team",
        "archived_at": None,
        "weight": 2.0,
        "max_running_jobs": None,
        "max_queued_jobs": 3,
        "max_bytes": 100,
        "max_accelerator_hours": None,
    }


def test_usage_stands_beside_each_limit_and_paused_jobs_wait_as_queued_ones_do() -> None:
    jobs = {"queued": 1, "running": 4, "paused": 2, "succeeded": 9, "failed": 0, "cancelled": 0}
    told = usage_object(PROJECT, Usage(num_bytes=7, jobs=jobs, accelerator_hours=1.23456789))
    assert told["limits"] == {
        "max_running_jobs": {"used": 4, "limit": None},
        "max_queued_jobs": {"used": 3, "limit": 3},
        "max_bytes": {"used": 7, "limit": 100},
        "max_accelerator_hours": {"used": 1.234568, "limit": None},
    }
    assert (told["project_id"], told["jobs"]) == ("proj_1", jobs)


def test_of_a_key_only_the_end_is_told() -> None:
    key = Key(id="key_1", created_at=AT, name="ci", project_id="proj_1", sha256="secret", hint="wxyz", scopes=["read"])
    key.revoked_at = AT
    told = key_object(key)
    assert told["redacted_value"] == "rd-…wxyz"
    assert (told["revoked_at"], told["expires_at"], told["last_used_at"]) == (SECONDS, None, None)
    assert "secret" not in str(told)


def test_an_entry_of_the_audit_log_says_who_did_what_and_how_often() -> None:
    entry = AuditEntry(id=5, created_at=AT, project_id="proj_1", key_id="key_1", request_id="req_1", status=403)
    entry.action, entry.object_id, entry.code, entry.num_requests = "GET /v1/x/keys", None, "missing_scope", 12
    told = audit_object(entry)
    assert (told["id"], told["object"], told["created_at"]) == (5, "audit.entry", SECONDS)
    assert (told["action"], told["status"], told["code"]) == ("GET /v1/x/keys", 403, "missing_scope")
    assert (told["key_id"], told["object_id"], told["num_requests"]) == ("key_1", None, 12)

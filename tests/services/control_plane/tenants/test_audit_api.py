"""Tests the list of the audit log."""

import httpx

from tests.services.control_plane.conftest import api_of, new_key, new_project


def test_changes_are_told_to_admins_with_who_made_them(api: httpx.Client, base_url: str) -> None:
    project = new_project(api, "audited")
    admin = new_key(api, project_id=project, scopes=["admin", "write"])
    with api_of(base_url, admin["value"]) as theirs:
        revoked = theirs.post(f"/x/keys/{new_key(theirs)['id']}/revoke")
        entries = theirs.get("/x/audit").json()["data"]
    assert [entry["action"] for entry in entries] == ["POST /v1/x/keys/{key_id}/revoke", "POST /v1/x/keys"]
    assert {(entry["key_id"], entry["project_id"], entry["status"]) for entry in entries} == {
        (admin["id"], project, 200)
    }
    assert entries[0]["object_id"] == revoked.json()["id"]
    assert entries[0]["request_id"] == revoked.headers["x-request-id"]
    everything = api.get("/x/audit", params={"limit": 100}).json()["data"]
    assert entries == [entry for entry in everything if entry["project_id"] == project]
    first = api.get("/x/audit", params={"limit": 1}).json()
    second = api.get("/x/audit", params={"limit": 1, "after": first["last_id"]}).json()
    assert [*first["data"], *second["data"]] == everything[:2]

"""Tests which refused requests are in the audit log, and how many of them."""

from typing import Any

import httpx

from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import answering, api_of, new_key, new_project, pairs


def audit_of(api: httpx.Client, key: dict[str, Any]) -> list[dict[str, Any]]:
    entries = api.get("/x/audit", params={"limit": 100, "project_id": key["project_id"]}).json()["data"]
    return [entry for entry in entries if entry["key_id"] == key["id"]]


def test_what_a_key_is_refused_is_in_the_audit(api: httpx.Client, base_url: str) -> None:
    project = new_project(api, "refused", max_queued_jobs=0)
    key, theirs_elsewhere = new_key(api, project_id=project, scopes=["read", "write"]), new_key(api)
    with api_of(base_url, key["value"]) as theirs:
        file = theirs.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"}).json()
        refused = [
            theirs.get("/x/keys"),
            theirs.post("/x/keys", json={"name": "more", "scopes": ["admin"]}),
            theirs.delete(f"/files/{stranger_file(api)}"),
            theirs.post("/fine_tuning/jobs/ftjob-none/cancel"),
            theirs.post(f"/x/keys/{theirs_elsewhere['id']}/revoke"),
            theirs.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": stranger_file(api)}),
            theirs.post(
                "/fine_tuning/jobs", json={"model": "tiny", "training_file": file["id"], "method": {"type": "dpo"}}
            ),
            theirs.get("/files", headers={"OpenAI-Project": "proj_default"}),
        ]
        # Everyday mistakes, and what tells nothing of who may do what.
        for answer in (theirs.get("/files/file-none"), theirs.post("/fine_tuning/jobs", json={}), theirs.get("/none")):
            assert answer.status_code in (400, 404)
    with api_of(base_url, key["value"] + "x") as nobody:
        assert nobody.delete(f"/files/{file['id']}").status_code == 401
    told = [entry for entry in reversed(audit_of(api, key)) if entry["status"] != 200]
    assert [(entry["status"], entry["code"]) for entry in told] == [
        (403, "missing_scope"),
        (403, "missing_scope"),
        (404, "file_not_found"),
        (404, "fine_tune_not_found"),
        (403, "missing_scope"),
        (404, "file_not_found"),
        (429, "exceeded_quota"),
        (401, "mismatched_project"),
    ]
    assert [entry["request_id"] for entry in told] == [answer.headers["x-request-id"] for answer in refused]
    assert [entry["action"] for entry in told[2:5]] == [
        "DELETE /v1/files/{file_id}",
        "POST /v1/fine_tuning/jobs/{job_id}/cancel",
        "POST /v1/x/keys/{key_id}/revoke",
    ]
    assert told[3]["object_id"] == "ftjob-none"
    assert {entry["num_requests"] for entry in told} == {1}


def stranger_file(api: httpx.Client) -> str:
    sent = api.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"})
    return str(sent.json()["id"])


def test_a_completion_of_a_policy_that_is_another_s_is_refused_in_the_audit(api: httpx.Client, base_url: str) -> None:
    key = new_key(api, project_id=new_project(api, "asking"), scopes=["inference"])
    with api_of(base_url, key["value"]) as theirs:
        assert theirs.post("/chat/completions", json={"model": "ft:none", "messages": []}).status_code == 404
    (entry,) = audit_of(api, key)
    assert (entry["action"], entry["code"]) == ("POST /v1/chat/completions", "model_not_found")


def test_a_key_that_is_refused_all_the_time_leaves_ten_lines_a_minute_and_one_that_counts_the_rest(
    api: httpx.Client, settings: Settings
) -> None:
    first, second = new_key(api, scopes=["read", "write"]), new_key(api, scopes=["read", "write"])
    long = "/fine_tuning/jobs/" + "x" * 5000 + "/pause"
    with answering(settings) as url, api_of(url, first["value"]) as theirs, api_of(url, second["value"]) as others:
        for number in range(14):
            assert theirs.post(f"/fine_tuning/jobs/ftjob-{number}/cancel").status_code == 404
        assert theirs.post(long).status_code == 404
        assert others.post(long).status_code == 404
        assert len(audit_of(api, first)) == 10
        assert [entry["object_id"] for entry in audit_of(api, second)] == ["x" * 100]
    told = audit_of(api, first)  # the end of the service is that of its minute, too
    assert [(entry["num_requests"], entry["object_id"]) for entry in told[:3]] == [
        (1, None),
        (4, None),
        (1, "ftjob-9"),
    ]
    assert {entry["code"] for entry in told} == {"fine_tune_not_found"}
    assert len(told) == 12

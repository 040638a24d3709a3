"""Tests who may have and change projects."""

import threading

import httpx

from tests.services.control_plane.conftest import EVERY_SCOPE, api_of, new_key, new_project


def test_the_default_project_cannot_be_archived(api: httpx.Client) -> None:
    assert api.post("/x/projects/proj_default/archive").status_code == 400


def test_nobody_raises_the_limits_of_his_own_project(api: httpx.Client, base_url: str) -> None:
    project = new_project(api, "limited", max_bytes=0)
    with api_of(base_url, new_key(api, project_id=project, scopes=EVERY_SCOPE)["value"]) as own:
        assert own.get(f"/x/projects/{project}").json()["max_bytes"] == 0
        assert [each["id"] for each in own.get("/x/projects").json()["data"]] == [project]
        for path in ("", f"/{project}", f"/{project}/archive"):
            refused = own.post(f"/x/projects{path}", json={"name": "mine"} if not path.endswith("archive") else None)
            assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")


def test_of_two_projects_that_want_one_name_at_once_one_gets_it(api: httpx.Client) -> None:
    answers: list[httpx.Response] = []

    def create() -> None:
        answers.append(api.post("/x/projects", json={"name": "the same"}))

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400]


def test_only_an_archived_project_is_deleted_and_its_name_is_free_then(api: httpx.Client, base_url: str) -> None:
    project = new_project(api, "for some time")
    refused = api.delete(f"/x/projects/{project}")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "project_id")
    assert "archive it before you delete it" in refused.json()["error"]["message"]
    with api_of(base_url, new_key(api, project_id=project, scopes=EVERY_SCOPE)["value"]) as own:
        assert own.delete(f"/x/projects/{project}").status_code == 403
    api.post(f"/x/projects/{project}/archive")
    assert api.delete(f"/x/projects/{project}").json() == {"id": project, "object": "project", "deleted": True}
    assert project not in [each["id"] for each in api.get("/x/projects", params={"limit": 100}).json()["data"]]
    for path in ("", "/usage"):
        assert api.get(f"/x/projects/{project}{path}").json()["error"]["code"] == "project_not_found"
    assert api.delete(f"/x/projects/{project}").status_code == 404
    assert new_project(api, "for some time") != project
    assert api.delete("/x/projects/proj_default").status_code == 400

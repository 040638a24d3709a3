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

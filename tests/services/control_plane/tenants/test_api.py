"""Tests the routes of projects."""

from typing import Any

import httpx
import pytest

from tests.services.control_plane.conftest import api_of, new_key, new_project


def limits(answer: dict[str, Any]) -> list[Any]:
    names = ("max_running_jobs", "max_queued_jobs", "max_bytes", "max_accelerator_hours")
    return [answer[name] for name in names]


def test_a_project_is_created_listed_limited_and_archived(api: httpx.Client, base_url: str) -> None:
    project = new_project(api, "research", max_queued_jobs=2, max_accelerator_hours=1.5)
    path = f"/x/projects/{project}"
    assert limits(api.get(path).json()) == [None, 2, None, 1.5]
    changed = api.post(path, json={"max_queued_jobs": None, "max_bytes": 10, "weight": 2}).json()
    assert changed["weight"] == 2
    assert (changed["name"], limits(changed)) == ("research", [None, None, 10, 1.5])
    assert changed in api.get("/x/projects").json()["data"]

    with api_of(base_url, new_key(api, project_id=project)["value"]) as own:
        assert own.get("/files").status_code == 200
    key = new_key(api, project_id=project)
    assert api.post(f"{path}/archive").json()["archived_at"] is not None
    with api_of(base_url, key["value"]) as own:
        assert own.get("/files").status_code == 401
    for refused in (
        api.post(path, json={"name": "again"}),
        api.post("/x/keys", json={"name": "k", "project_id": project}),
    ):
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "project_id")
        assert "is archived" in refused.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "default"}, "name"),
        ({}, "name"),
        ({"name": "n", "max_bytes": -1}, "max_bytes"),
        ({"name": "n", "max_accelerator_hours": "many"}, "max_accelerator_hours"),
        ({"name": "n", "max_jobs": 1}, "max_jobs"),
        ({"name": "n", "weight": 0}, "weight"),
        ({"name": "n", "weight": None}, "weight"),
    ],
)
def test_a_wrong_project_is_refused_by_name(api: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = api.post("/x/projects", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

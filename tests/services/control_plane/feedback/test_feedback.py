"""Tests that votes are stored, counted as bytes, and written in their order."""

import json

import httpx

from tests.services.control_plane.conftest import api_of, new_key, new_project
from tests.services.control_plane.feedback import test_api as api_tests
from tests.services.control_plane.feedback.test_api import CHAT, GOOD, vote

project = api_tests.project  # fixtures


def test_many_votes_are_written_in_their_order_without_the_deleted_ones(project: httpx.Client) -> None:
    ids = [vote(project, completions=[GOOD], thumb="up")["id"] for _ in range(120)]
    for gone in ids[::40]:
        assert project.delete(f"/x/feedback/{gone}").json() == {"id": gone, "object": "feedback", "deleted": True}
    file = project.post("/x/feedback/files", json={"kind": "unpaired"}).json()
    lines = project.get(f"/files/{file['id']}/content").text.splitlines()
    left = [name for name in ids if name not in ids[::40]]
    assert [json.loads(line)["feedback"]["id"] for line in lines] == left


def test_votes_count_as_bytes_of_the_project(api: httpx.Client, base_url: str) -> None:
    project_id = new_project(api, "few bytes", max_bytes=500)
    with api_of(base_url, new_key(api, project_id=project_id)["value"]) as own:
        vote(own, completions=[GOOD], thumb="up")
        used = api.get(f"/x/projects/{project_id}/usage").json()["limits"]["max_bytes"]["used"]
        assert 100 < used < 400
        answer = own.post("/x/feedback", json={"prompt": CHAT, "completions": [GOOD], "thumb": "up"})
        answer = own.post("/x/feedback", json={"prompt": CHAT, "completions": [GOOD], "thumb": "up"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "exceeded_quota")

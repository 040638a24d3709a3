"""Tests that sweeps, their trials and their frontiers are what the OpenAPI document describes."""

import httpx
import pytest

from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import FakeRay
from tests.services.control_plane.http.test_documented_answers import check
from tests.services.control_plane.sweeps.conftest import DRIFT, SCORE, begun, body, ended, train

pytestmark = pytest.mark.slow


def test_every_answer_is_as_the_document_says(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str
) -> None:
    route = "/x/sweeps"
    sweep = body(file_id, metric={"name": "eval/loss"}, evaluations={"words": SCORE, "moved": DRIFT})
    made = check("post", route, api.post(route, json=sweep))
    for number in range(3):
        train(settings, fake_ray, begun(api, made["id"], number)["job_id"], [0.5])
    ended(api, made["id"])
    found = check("get", f"{route}/{{sweep_id}}", api.get(f"{route}/{made['id']}"))
    assert found["best"]["id"] == "0"
    listed = check("get", route, api.get(route, params={"limit": 1, "status": "succeeded"}))
    assert [each["id"] for each in listed["data"]] == [made["id"]]
    trials = f"{route}/{{sweep_id}}/trials"
    first = check("get", trials, api.get(f"{route}/{made['id']}/trials", params={"limit": 2}))
    rest = check("get", trials, api.get(f"{route}/{made['id']}/trials", params={"after": first["last_id"]}))
    assert [each["id"] for each in first["data"] + rest["data"]] == ["0", "1", "2"]
    frontier = check("get", f"{route}/{{sweep_id}}/frontier", api.get(f"{route}/{made['id']}/frontier"))
    assert len(frontier["data"]) == 3

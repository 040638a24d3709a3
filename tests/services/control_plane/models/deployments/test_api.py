"""Tests the REST API of deployments: who may change what, what is refused, and the effect of a change."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import psycopg
import pytest

from services.control_plane.settings import BaseModel, DeploymentLimits, Settings
from tests.services.control_plane.conftest import FakeRay
from tests.services.control_plane.http.test_documented_answers import check

QWEN = "qwen"
POLICY = "ft:org/tiny:raydpo::12345678:ckpt-step-3"


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay) -> Settings:
    fake_ray.resources = {"CPU": 8.0, "GPU": 4.0}
    models = {"tiny": BaseModel(source="/nowhere/tiny"), QWEN: BaseModel(source="/nowhere/qwen")}
    ray = {"ray_url": f"http://127.0.0.1:{fake_ray.server.server_port}", "model_wait_seconds": 60.0}
    limits = {"project_deployments": DeploymentLimits(max_replicas=2, max_gpus=2)}
    return offline.model_copy(update=ray | limits | {"models": models})


def deployment(api: httpx.Client, model_id: str) -> dict[str, Any]:
    answer = api.get(f"/x/deployments/{model_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def change(api: httpx.Client, model_id: str, **values: Any) -> dict[str, Any]:
    answer = api.put(f"/x/deployments/{model_id}", json=values)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(api: httpx.Client, model_id: str, status: int = 400, **values: Any) -> dict[str, Any]:
    answer = api.put(f"/x/deployments/{model_id}", json=values)
    assert answer.status_code == status, answer.text
    return dict(answer.json()["error"])


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def served(fake_ray: FakeRay) -> dict[str, Any]:
    configs = [app["deployed_app_config"] for app in list(fake_ray.serve.values())]
    return {config["args"]["model_id"]: config["args"] for config in configs}


def test_a_deployment_is_read_changed_and_reset(api: httpx.Client) -> None:
    plain = deployment(api, "tiny")
    assert (plain["id"], plain["object"], plain["state"]) == ("tiny", "deployment", "unloaded")
    assert plain["settings"]["replicas"] == {"min": 1, "max": 1, "target_ongoing_requests": 32}
    assert plain["requests_in_flight"] is None
    changed = change(api, "tiny", replicas=2, idle_seconds=60, max_model_len=100, tool_call_parser="hermes")
    assert changed["settings"]["replicas"]["max"] == 2
    assert deployment(api, "tiny")["settings"] == changed["settings"]
    assert changed["chosen"].keys() == {"replicas", "idle_seconds", "max_model_len", "tool_call_parser"}
    assert change(api, "tiny", dtype="bfloat16")["settings"]["idle_seconds"] is None  # a PUT sets them all
    assert api.delete("/x/deployments/tiny").json()["settings"] == plain["settings"]
    assert api.get("/models/tiny").status_code == 200


def test_answers_have_the_documented_fields(api: httpx.Client) -> None:
    check("get", "/x/deployments", api.get("/x/deployments"))
    one = "/x/deployments/{model_id}"
    check("get", one, api.get("/x/deployments/tiny"))
    check("put", one, api.put("/x/deployments/tiny", json={"replicas": 2}))
    check("delete", one, api.delete("/x/deployments/tiny"))
    for act in ("warm", "unload"):
        check("post", f"{one}/{act}", api.post(f"/x/deployments/tiny/{act}"))


def test_deployments_are_listed_in_pages(api: httpx.Client) -> None:
    first = api.get("/x/deployments", params={"limit": 1}).json()
    assert ([each["id"] for each in first["data"]], first["has_more"]) == (["tiny"], True)
    after = api.get("/x/deployments", params={"after": first["last_id"]}).json()
    assert after["data"][0]["id"] == QWEN


def test_a_pinned_model_is_loaded_without_a_request_and_replaced_when_its_settings_change(
    api: httpx.Client, fake_ray: FakeRay
) -> None:
    change(api, "tiny", pinned=True)
    until(lambda: "tiny" in served(fake_ray), "it is loaded")
    until(lambda: deployment(api, "tiny")["state"] == "running", "it is told")
    before = served(fake_ray)["tiny"]
    change(api, "tiny", pinned=True, idle_seconds=9, max_model_len=64, replicas={"max": 3})
    until(lambda: served(fake_ray)["tiny"] != before, "it is replaced")
    assert served(fake_ray)["tiny"]["max_model_len"] == 64
    assert served(fake_ray)["tiny"]["engine"]["replicas"]["max"] == 3
    answer = api.post("/x/deployments/tiny/unload")
    assert (answer.status_code, "is pinned" in answer.text) == (400, True)
    api.delete("/x/deployments/tiny")
    assert api.post("/x/deployments/tiny/unload").status_code == 200
    until(lambda: "tiny" not in served(fake_ray), "it is unloaded")
    until(lambda: deployment(api, "tiny")["state"] == "unloaded", "it is told")


def test_a_model_is_warmed_and_unloaded_on_request_and_why_it_failed_is_told(
    api: httpx.Client, fake_ray: FakeRay
) -> None:
    assert api.post(f"/x/deployments/{QWEN}/warm").json()["state"] == "waiting"
    until(lambda: deployment(api, QWEN)["state"] == "running", "it is loaded")
    (name,) = [name for name in fake_ray.serve if QWEN in name]
    fake_ray.serve[name] |= {"status": "DEPLOY_FAILED", "message": "ValueError: no memory"}
    until(lambda: deployment(api, QWEN)["state"] == "failed", "it is told")
    assert deployment(api, QWEN)["error"] == "ValueError: no memory"
    assert api.post(f"/x/deployments/{QWEN}/unload").status_code == 200
    until(lambda: deployment(api, QWEN)["state"] == "unloaded", "it is gone")


def test_stored_settings_that_this_release_does_not_know_have_no_effect(api: httpx.Client, settings: Settings) -> None:
    change(api, "tiny", max_model_len=64)
    with psycopg.connect(settings.database_url) as connection:
        later = """values || '{"tool_call_parser": "of-a-later-release", "of_a_later_release": 1}'"""
        connection.execute(f"UPDATE model_settings SET values = {later} WHERE model_id = 'tiny'")
    found = deployment(api, "tiny")["settings"]
    assert (found["max_model_len"], found["tool_call_parser"]) == (64, None)
    api.delete("/x/deployments/tiny")


def test_while_ray_is_away_nothing_is_changed(api: httpx.Client, fake_ray: FakeRay) -> None:
    fake_ray.down = True
    time.sleep(0.6)  # a look at Serve is kept for half a second
    try:
        answer = api.put("/x/deployments/tiny", json={"replicas": 2})
    finally:
        fake_ray.down = False
    assert answer.status_code == 503
    assert "The Ray cluster does not answer" in answer.text

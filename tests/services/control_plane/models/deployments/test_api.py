"""Tests the REST API of deployments: who may change what, what is refused, and the effect of a change."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psycopg
import pytest

from services.control_plane.settings import BaseModel, DeploymentLimits, Settings
from tests.services.control_plane.conftest import FakeRay, api_of, new_key, new_project, pairs
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
    deadline = time.monotonic() + 30
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


@pytest.mark.parametrize(
    ("values", "param", "said"),
    [
        ({"num_gpus": 8}, "num_gpus", "1 replicas need 8 GPUs, and the cluster has, or may grow to, 4; choose fewer"),
        ({"num_gpus": 1, "replicas": 5}, "num_gpus", "5 replicas need 5 GPUs"),
        ({"replicas": 9}, "replicas", "9 replicas need 9 CPUs, and the cluster has, or may grow to, 8"),
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization", "but the model is served on CPUs; set num_gpus"),
        (
            {"quantization": "fp8"},
            "quantization",
            "quantization is fp8, which only GPUs support, but the model is served on CPUs",
        ),
        ({"quantization": "fp8", "num_gpus": 1, "dtype": "float32"}, "quantization", "set dtype to bfloat16"),
        ({"quantization": "awq"}, "quantization", "'awq'"),
        ({"tool_call_parser": "hermess"}, "tool_call_parser", "'hermes'"),
        ({"replicas": {"min": 3, "max": 2}}, "replicas", "replicas.min is 3, which is more than replicas.max, 2"),
        ({"num_gpu": 1}, "num_gpu", "Unknown parameter"),
    ],
)
def test_what_cannot_work_is_refused_with_value_limit_and_remedy(
    api: httpx.Client, values: dict[str, Any], param: str, said: str
) -> None:
    error = refused(api, "tiny", **values)
    assert error["param"] == param
    assert said in error["message"]
    assert deployment(api, "tiny")["settings"]["num_gpus"] == 0


def test_one_place_stays_free_of_pinned_models(api: httpx.Client) -> None:
    change(api, "tiny", pinned=True)
    change(api, "tiny", pinned=True, idle_seconds=9)  # itself is not another one
    error = refused(api, QWEN, pinned=True)
    assert error["param"] == "pinned"
    assert "1 other models are pinned, and of 2 places one stays free" in error["message"]
    api.delete("/x/deployments/tiny")


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


@pytest.fixture(scope="module")
def own(api: httpx.Client, base_url: str, settings: Settings) -> Iterator[httpx.Client]:
    """Returns an HTTP client with a key of a project that has a policy."""
    project = new_project(api, "deploys")
    key = new_key(api, project_id=project, scopes=["read", "write", "inference", "admin"])["value"]
    with api_of(base_url, key) as own:
        file = own.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"}).json()
        job = {"model": "tiny", "training_file": file["id"], "method": {"type": "dpo"}}
        job_id = own.post("/fine_tuning/jobs", json=job).json()["id"]
        own.post(f"/fine_tuning/jobs/{job_id}/cancel")
        with psycopg.connect(settings.database_url) as connection:
            row = (POLICY, "file:///nowhere/model", "tiny", job_id, project)
            columns = "id, source, root, job_id, project_id"
            connection.execute(f"INSERT INTO models ({columns}) VALUES (%s, %s, %s, %s, %s)", row)
        yield own


def test_a_project_sets_its_own_policy_within_the_operators_limits_and_no_base_model(
    api: httpx.Client, own: httpx.Client, base_url: str
) -> None:
    error = refused(own, "tiny", 403, replicas=1)
    assert "only an admin key of the project proj_default" in error["message"]
    assert change(own, POLICY, replicas=2)["settings"]["replicas"]["max"] == 2
    assert deployment(own, POLICY.replace("/", "%2F"))["id"] == POLICY
    error = refused(own, POLICY, replicas=3)
    assert (
        "replicas is 3, but a project may have at most 2 replicas of a model; an admin of proj_default"
        in error["message"]
    )
    error = refused(own, POLICY, num_gpus=2, replicas=2)
    assert "num_gpus of all replicas is 4, but a project may use at most 2 GPUs for a model" in error["message"]
    assert refused(own, POLICY, pinned=True)["param"] == "pinned"
    change(api, "tiny", reasoning_parser="qwen3", replicas=2)  # its policies inherit the parser, not the replicas
    own.delete(f"/x/deployments/{POLICY}")
    inherited = deployment(own, POLICY)["settings"]
    assert (inherited["reasoning_parser"], inherited["replicas"]["max"]) == ("qwen3", 1)
    api.delete("/x/deployments/tiny")
    newest = own.get("/x/audit").json()["data"][0]
    assert (newest["action"], newest["object_id"]) == ("DELETE /v1/x/deployments/{model_id:path}", POLICY)
    assert api.get(f"/x/deployments/{POLICY}").status_code == 404
    with api_of(base_url, new_key(api, scopes=["read"])["value"]) as reader:
        assert reader.get("/x/deployments/tiny").status_code == 200
        assert reader.put("/x/deployments/tiny", json={}).json()["error"]["code"] == "missing_scope"


def test_a_reward_model_takes_no_settings_of_vllm(api: httpx.Client, settings: Settings, own: httpx.Client) -> None:
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("UPDATE models SET num_outputs = 1 WHERE id = %s", [POLICY])
    wrong = {"prefix_caching": True, "tool_call_parser": "hermes", "num_gpus": 2, "dtype": "float16"}
    for field, value in wrong.items():
        error = refused(own, POLICY, **{field: value})
        assert (error["param"], field in error["message"]) == (field, True)
    assert change(own, POLICY, num_gpus=1, dtype="bfloat16", max_model_len=128)["settings"]["num_gpus"] == 1


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

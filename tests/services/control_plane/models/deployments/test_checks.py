"""Tests which settings of a deployment are refused, and to whom."""

from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest

from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import api_of, new_key, new_project, pairs
from tests.services.control_plane.models.deployments import test_api as api_tests
from tests.services.control_plane.models.deployments.test_api import POLICY, QWEN, change, deployment, refused

settings = api_tests.settings  # fixtures


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
            "'quantization' is 'fp8', which only GPUs support, but the model is served on CPUs",
        ),
        ({"quantization": "fp8", "num_gpus": 1, "dtype": "float32"}, "quantization", "set 'dtype' to 'bfloat16'"),
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
    assert "1 other models are pinned (always loaded), and at most 1 can be pinned" in error["message"]
    api.delete("/x/deployments/tiny")


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
        "'replicas' is 3, but a project may have at most 2 replicas of a model; an admin of proj_default"
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

"""Tests which sweeps the service refuses, and how."""

from typing import Any

import httpx
import psycopg
import pytest

from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import EVERY_SCOPE, api_of, new_key, new_project
from tests.services.control_plane.evaluations.conftest import until
from tests.services.control_plane.sweeps.conftest import BETA, SCORE, begun, body, created

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"parameters": {}}, "parameters", "invalid_value"),
        ({"parameters": {BETA: {"values": [0.1, -1]}}}, f"job.{BETA}", "invalid_value"),
        ({"parameters": {"model": {"values": ["tiny", "nobody"]}}}, "job.model", "model_not_found"),
        ({"job": {"model": "tiny", "training_file": "file-0"}}, "job.training_file", "file_not_found"),
        ({"evaluations": {"a": SCORE | {"rows": None, "file": "file-0"}}}, "evaluations.a.file", "file_not_found"),
        ({"evaluations": {"a": SCORE | {"rows": [{"prompt": 7}]}}}, "evaluations.a.rows.0.prompt", "invalid_value"),
        (
            {"evaluations": {"a": SCORE | {"judge": {"type": "model", "model": "nobody"}}}},
            "evaluations.a.judge.model",
            "model_not_found",
        ),
        (
            {"evaluations": {"a": SCORE | {"kind": "compare", "baseline": "nobody"}}},
            "evaluations.a.baseline",
            "model_not_found",
        ),
        (
            {
                "evaluations": {"a": SCORE | {"kind": "samples", "judge": {"type": "model", "model": "fair"}}},
                "metric": {"name": "a/score"},
            },
            "metric.name",
            "invalid_value",
        ),
        ({"colour": "red"}, "colour", "unknown_parameter"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_by_its_field(
    api: httpx.Client, file_id: str, more: dict[str, Any], param: str, code: str
) -> None:
    if "job" in more:
        more["parameters"] = {"seed": {"values": [1, 2]}}
    answer = api.post("/x/sweeps", json=body(file_id) | more)
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert api.get("/x/sweeps", params={"status": "running"}).json()["data"] == []


def test_what_is_not_there_is_404(api: httpx.Client) -> None:
    for path in ("", "/trials", "/frontier"):
        answer = api.get(f"/x/sweeps/sweep-0{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "sweep_not_found")


def test_a_sweep_that_has_ended_is_deleted_and_leaves_its_jobs(
    api: httpx.Client, settings: Settings, file_id: str
) -> None:
    made = created(api, **body(file_id, evaluations={"words": SCORE}))
    job_id = begun(api, made["id"], 0)["job_id"]
    refused = api.delete(f"/x/sweeps/{made['id']}")
    assert (refused.status_code, "cancel it before" in refused.text) == (400, True)
    api.post(f"/x/sweeps/{made['id']}/cancel")
    with psycopg.connect(settings.database_url) as connection:
        kept = connection.execute("SELECT count(*) FROM sweep_evaluations WHERE sweep_id = %s", (made["id"],))
        assert kept.fetchone() == (0,)  # the rows of its evaluations are of no more use
    assert api.delete(f"/x/sweeps/{made['id']}").json() == {"id": made["id"], "object": "sweep", "deleted": True}
    assert api.get(f"/x/sweeps/{made['id']}").json()["error"]["code"] == "sweep_not_found"
    assert api.get(f"/fine_tuning/jobs/{job_id}").status_code == 200


def test_a_sweep_without_a_drift_has_no_frontier(api: httpx.Client, file_id: str) -> None:
    made = created(api, **body(file_id, evaluations={"words": SCORE}))
    answer = api.get(f"/x/sweeps/{made['id']}/frontier")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "kl")


def test_a_project_with_a_running_sweep_is_not_archived(api: httpx.Client, base_url: str) -> None:
    project = new_project(api, "with a sweep")
    key = new_key(api, scopes=EVERY_SCOPE, project_id=project)
    with api_of(base_url, key["value"]) as own:
        made = created(own, **body(upload(own)))
        until(lambda: own.get(f"/x/sweeps/{made['id']}/trials").json()["data"])
        for job in own.get("/fine_tuning/jobs").json()["data"]:
            own.post(f"/fine_tuning/jobs/{job['id']}/cancel")
        own.post(f"/x/sweeps/{made['id']}/cancel")
        until(lambda: not any(job["status"] == "running" for job in own.get("/fine_tuning/jobs").json()["data"]))
    assert api.post(f"/x/projects/{project}/archive").status_code == 200


def upload(api: httpx.Client) -> str:
    from tests.services.control_plane.conftest import pairs

    answer = api.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"})
    return str(answer.json()["id"])

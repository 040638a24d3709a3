"""Real answers have the fields that the OpenAPI document describes, all of them and no others."""

from typing import Any

import httpx
import jsonschema
import psycopg
import pytest

from services.control_plane.app import create_app
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, new_project, pairs

NOWHERE = dict.fromkeys(("DATABASE_URL", "storage_url", "advertised_url", "ray_url"), "http://nowhere")
DOCUMENT = create_app(Settings(**NOWHERE, api_key=API_KEY)).openapi()


def close(schema: Any) -> Any:
    """The schema, and no other fields than those that it names."""
    if isinstance(schema, list):
        return [close(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: close(value) for name, value in schema.items()}
    return closed | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else closed


SCHEMAS = close(DOCUMENT["components"]["schemas"])


def check(method: str, route: str, answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    documented = DOCUMENT["paths"][f"/v1{route}"][method]["responses"]["200"]["content"]["application/json"]["schema"]
    assert "$ref" in documented
    jsonschema.validate(answer.json(), {**documented, "components": {"schemas": SCHEMAS}})
    return dict(answer.json())


@pytest.fixture(scope="module")
def file_id(api: httpx.Client) -> str:
    answer = api.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"})
    return str(check("post", "/files", answer)["id"])


def body(file_id: str) -> dict[str, Any]:
    hyperparameters = {"beta": 0.2, "learning_rate": 1e-4}
    return {
        "model": "tiny",
        "training_file": file_id,
        "suffix": "first",
        "metadata": {"team": "shop"},
        "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
        "integrations": [{"type": "wandb", "wandb": {"project": "answers"}}],
        "x_raydpo": {"validation_share": 0.25, "early_stop": {"patience": 2}, "mlflow": {"experiment": "answers"}},
    }


@pytest.fixture(scope="module")
def job_id(api: httpx.Client, file_id: str) -> str:
    return str(check("post", "/fine_tuning/jobs", api.post("/fine_tuning/jobs", json=body(file_id)))["id"])


def test_files(api: httpx.Client, file_id: str) -> None:
    check("get", "/files", api.get("/files"))
    check("get", "/files/{file_id}", api.get(f"/files/{file_id}"))
    check("post", "/x/datasets/check", api.post("/x/datasets/check", json={"training_file": file_id}))


def test_uploads(api: httpx.Client) -> None:
    rows = pairs()
    wanted = {"bytes": len(rows), "filename": "rows.jsonl", "purpose": "fine-tune", "mime_type": "text/plain"}
    upload = check("post", "/uploads", api.post("/uploads", json=wanted))
    answer = api.post(f"/uploads/{upload['id']}/parts", files={"data": rows})
    part = check("post", "/uploads/{upload_id}/parts", answer)
    answer = api.post(f"/uploads/{upload['id']}/complete", json={"part_ids": [part["id"]]})
    assert check("post", "/uploads/{upload_id}/complete", answer)["file"]["status"] == "processed"


def test_jobs(api: httpx.Client, job_id: str, file_id: str) -> None:
    assert check("get", "/fine_tuning/jobs", api.get("/fine_tuning/jobs"))["data"]
    check("get", "/fine_tuning/jobs/{job_id}", api.get(f"/fine_tuning/jobs/{job_id}"))
    for wish in ("pause", "resume"):
        check("post", f"/fine_tuning/jobs/{{job_id}}/{wish}", api.post(f"/fine_tuning/jobs/{job_id}/{wish}"))
    draft = check("post", "/x/jobs/validate", api.post("/x/jobs/validate", json=body(file_id)))
    assert draft["id"] is None


def test_what_a_job_reports(api: httpx.Client, job_id: str) -> None:
    check("get", "/fine_tuning/jobs/{job_id}/events", api.get(f"/fine_tuning/jobs/{job_id}/events"))
    check("get", "/fine_tuning/jobs/{job_id}/checkpoints", api.get(f"/fine_tuning/jobs/{job_id}/checkpoints"))
    check("get", "/x/jobs/{job_id}/metrics", api.get(f"/x/jobs/{job_id}/metrics"))
    check("get", "/x/jobs/{job_id}/logs", api.get(f"/x/jobs/{job_id}/logs"))


def test_rows(api: httpx.Client, file_id: str) -> None:
    assert check("get", "/x/datasets/{file_id}/rows", api.get(f"/x/datasets/{file_id}/rows"))["data"]


def test_methods_and_models(api: httpx.Client) -> None:
    assert len(check("get", "/x/methods", api.get("/x/methods"))["data"]) > 20
    assert len(check("get", "/x/options", api.get("/x/options"))["data"]) > 20
    check("get", "/models", api.get("/models"))
    check("get", "/models/{model_id}", api.get("/models/tiny"))


def test_feedback(api: httpx.Client) -> None:
    vote = {"prompt": "Hello?", "completions": [{"completion": "Hi!", "model": "tiny"}], "thumb": "up"}
    made = check("post", "/x/feedback", api.post("/x/feedback", json=vote))
    check("get", "/x/feedback/{feedback_id}", api.get(f"/x/feedback/{made['id']}"))
    assert check("get", "/x/feedback", api.get("/x/feedback"))["counts"]
    body = {"kind": "unpaired", "form": "text"}
    check("post", "/x/feedback/files", api.post("/x/feedback/files", json=body))


@pytest.fixture(scope="module")
def model_id(settings: Settings, api: httpx.Client, job_id: str) -> str:
    """A trained model of the job."""
    name = "ft:tiny:raydpo::1"
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute(
            "INSERT INTO models (id, project_id, source, root, job_id) VALUES (%s, 'proj_default', 'x', 'tiny', %s)",
            [name, job_id],
        )
    return name


def test_permissions(api: httpx.Client, model_id: str) -> None:
    path = f"/fine_tuning/checkpoints/{model_id}/permissions"
    route = "/fine_tuning/checkpoints/{model_id}/permissions"
    assert check("post", route, api.post(path, json={"project_ids": [new_project(api, "a guest")]}))["data"]
    assert check("get", route, api.get(path))["data"]


def test_projects(api: httpx.Client) -> None:
    made = check("post", "/x/projects", api.post("/x/projects", json={"name": "documented", "max_bytes": 5}))
    path = f"/x/projects/{made['id']}"
    assert check("get", "/x/projects", api.get("/x/projects"))["data"]
    check("get", "/x/projects/{project_id}", api.get(path))
    check("get", "/x/projects/{project_id}/usage", api.get(f"{path}/usage"))
    check("post", "/x/projects/{project_id}", api.post(path, json={"weight": 2}))
    check("post", "/x/projects/{project_id}/archive", api.post(f"{path}/archive"))


def test_signing_in(api: httpx.Client) -> None:
    assert check("get", "/x/sign-in", api.get("/x/sign-in"))["oidc"] is None


def test_webhooks(api: httpx.Client) -> None:
    types = check("get", "/webhook_event_types", api.get("/webhook_event_types"))["data"]
    body = {"name": "documented", "url": "https://example.com/", "event_types": types}
    path = f"/webhook_endpoints/{check('post', '/webhook_endpoints', api.post('/webhook_endpoints', json=body))['id']}"
    route = "/webhook_endpoints/{endpoint_id}"
    assert check("get", "/webhook_endpoints", api.get("/webhook_endpoints"))["data"]
    check("get", route, api.get(path))
    check("post", route, api.post(path, json={"name": "changed"}))
    check("post", f"{route}/rotate_secret", api.post(f"{path}/rotate_secret"))
    check("delete", route, api.delete(path))


def test_keys_usage_and_the_audit_log(api: httpx.Client, settings: Settings) -> None:
    key = check("post", "/x/keys", api.post("/x/keys", json={"name": "documented"}))
    assert check("get", "/x/keys", api.get("/x/keys"))["data"]
    check("get", "/x/keys/{key_id}", api.get(f"/x/keys/{key['id']}"))
    check("post", "/x/keys/{key_id}/revoke", api.post(f"/x/keys/{key['id']}/revoke"))
    with psycopg.connect(settings.database_url) as rows:
        rows.execute("INSERT INTO usage VALUES ('proj_default', %s, 'tiny', now(), 1, 1, 1, 0.5)", [key["id"]])
    assert check("get", "/x/usage", api.get("/x/usage"))["data"]
    assert check("get", "/x/audit", api.get("/x/audit"))["data"]

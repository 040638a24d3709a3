"""Tests that no project reaches anything of another: project B requests A's objects on every route of the OpenAPI
document.

A new route is covered immediately: until A_HAS and BODIES say how to fill it, its test fails.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import psycopg
import pytest
from fastapi.routing import APIRoute

from services import storage
from services.control_plane.app import create_app
from services.control_plane.auth import scopes
from services.control_plane.http.dependencies import _idempotent
from services.control_plane.settings import Settings
from tests.services.control_plane.attempts.test_reconciler import reports, spool, ticks
from tests.services.control_plane.conftest import EVERY_SCOPE, FakeRay, api_of, new_key, new_project, pairs

NOWHERE = "http://127.0.0.1:9"
APP = create_app(
    Settings(DATABASE_URL=NOWHERE, storage_url=NOWHERE, api_key="-", advertised_url=NOWHERE, ray_url=NOWHERE)
)
DOCUMENT = APP.openapi()
# These tell nothing of anybody, and who signs in has no key yet.
OPEN = ("/healthz", "/readyz", "/v1/x/sign-in", "/v1/x/sign-in/token", "/v1/x/sign-in/refresh")

# Bodies of B that name something of A's, by the field that names it; where none does, one that is valid.
CHAT = {"messages": [{"role": "user", "content": "Hello?"}]}
JOB = {"model": "tiny", "training_file": "its own", "method": {"type": "dpo"}}
NAMED_BY_A_JOB: list[tuple[str | None, dict[str, Any]]] = [
    ("training_file", {**JOB, "training_file": "file_id"}),
    ("validation_file", {**JOB, "validation_file": "file_id"}),
    ("model", {**JOB, "model": "model_id"}),
]
ROWS = [{"prompt": "Hello?", "completions": ["Hi!", "No."]}]
EVALUATION = {"kind": "score", "model": "tiny", "judge": {"type": "length"}, "rows": [{"prompt": "Hello?"}]}
OF_A_SWEEP = {name: value for name, value in EVALUATION.items() if name != "model"}
SEEDS = {"seed": {"values": [1, 2]}}
SWEEP = {"job": JOB, "parameters": SEEDS}
ROUNDS = {"model": "tiny", "judge": {"type": "length"}, "rows": [{"prompt": "Hello?"}]}
BODIES: dict[str, list[tuple[str | None, dict[str, Any]]]] = {
    "POST /v1/fine_tuning/jobs": NAMED_BY_A_JOB,
    "POST /v1/x/jobs/validate": NAMED_BY_A_JOB,
    "POST /v1/x/datasets/check": [
        ("training_file", {"training_file": "file_id"}),
        ("model", {"training_file": "its own", "model": "model_id"}),
    ],
    "POST /v1/x/plans": [
        ("training_file", {**JOB, "training_file": "file_id"}),
        ("model", {**JOB, "model": "model_id"}),
    ],
    "POST /v1/chat/completions": [("model", {"model": "model_id", **CHAT})],
    "POST /v1/completions": [("model", {"model": "model_id", "prompt": "Hello?"})],
    "POST /v1/x/rewards": [
        ("model", {"model": "model_id", "rows": ROWS}),
        ("reference", {"model": "tiny", "reference": "model_id", "beta": 1, "rows": ROWS}),
    ],
    "POST /v1/x/evaluations": [
        ("model", {**EVALUATION, "model": "model_id"}),
        ("baseline", {**EVALUATION, "kind": "compare", "baseline": "model_id"}),
        ("file", {**EVALUATION, "rows": None, "file": "file_id"}),
    ],
    "POST /v1/x/sweeps": [
        *((f"job.{field}", {"job": job, "parameters": SEEDS}) for field, job in NAMED_BY_A_JOB),
        (
            "evaluations.a.file",
            {**SWEEP, "evaluations": {"a": {**OF_A_SWEEP, "rows": None, "file": "file_id"}}},
        ),
    ],
    "POST /v1/x/rounds": [
        ("model", {**ROUNDS, "model": "model_id"}),
        ("file", {**ROUNDS, "rows": None, "file": "file_id"}),
    ],
    "PUT /v1/x/deployments/{model_id}": [(None, {"pinned": True})],
    "POST /v1/x/keys": [("project_id", {"name": "a key", "project_id": "project_id"})],
    "POST /v1/x/projects/{project_id}": [(None, {"name": "taken over"})],
    "POST /v1/fine_tuning/checkpoints/{model_id}/permissions": [(None, {"project_ids": ["proj_default"]})],
    "POST /v1/webhook_endpoints/{endpoint_id}": [(None, {"name": "taken over"})],
    "POST /v1/webhook_endpoints/{endpoint_id}/rotate_secret": [(None, {})],
    "POST /v1/webhook_endpoints/{endpoint_id}/test": [(None, {"event_type": "fine_tuning.job.succeeded"})],
    "POST /v1/uploads/{upload_id}/complete": [(None, {"part_ids": ["part_none"]})],
    "POST /internal/attempts/{job_id}/{number}/events": [(None, {"events": []})],
}
TAKE_NO_IDS = (
    "POST /v1/files",
    "POST /v1/uploads",
    "POST /v1/uploads/{upload_id}/parts",
    "POST /v1/webhook_endpoints",
    "POST /v1/x/projects",
    "POST /v1/x/feedback",
    "POST /v1/x/feedback/files",
)
EVERYBODY_S = ("GET /v1/webhook_event_types", "GET /v1/x/methods", "GET /v1/x/options")
UPLOAD = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 10, "mime_type": "application/jsonl"}
VOTE = {"prompt": "Hello?", "completions": [{"completion": "Hi!"}], "thumb": "up"}
HOOK = {"name": "a hook", "url": f"{NOWHERE}/a", "event_types": ["fine_tuning.job.succeeded"]}


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    declared: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    def parameters(self, where: str) -> list[str]:
        return [each["name"] for each in self.declared.get("parameters", []) if each["in"] == where]

    def filled(self, ids: dict[str, str]) -> str:
        unknown = set(self.parameters("path")) - set(ids)
        assert not unknown, f"{self}: let A own something, and say in `a_has` what its {unknown} is"
        return self.path.format(**ids)


OPERATIONS = [
    Operation(method.upper(), path, declared)
    for path, methods in DOCUMENT["paths"].items()
    for method, declared in methods.items()
    if path not in OPEN
]
NAMED = [each for each in OPERATIONS if each.parameters("path")]
READ = [each for each in OPERATIONS if each.method == "GET" and str(each) not in EVERYBODY_S]
LISTS = [each for each in READ if not each.parameters("path")]
PAGED = [each for each in OPERATIONS if "after" in each.parameters("query") and "logs" not in each.path]  # bytes, there
WITH_BODY = [each for each in OPERATIONS if "requestBody" in each.declared]
CHANGES = [each for each in OPERATIONS if each.method != "GET" and each.path.startswith("/v1")]


def each_of(operations: list[Operation]) -> Any:
    return pytest.mark.parametrize("operation", operations, ids=str)


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay) -> Settings:
    ray_url = f"http://127.0.0.1:{fake_ray.server.server_port}"
    return offline.model_copy(update={"ray_url": ray_url, "webhook_urls": [f"{NOWHERE}/"]})


def upload(api: httpx.Client) -> str:
    file = {"file": ("pairs.jsonl", pairs())}
    return str(api.post("/files", files=file, data={"purpose": "fine-tune"}).json()["id"])


@pytest.fixture(scope="module")
def a(api: httpx.Client, base_url: str) -> Iterator[httpx.Client]:
    project = new_project(api, "a")
    with api_of(base_url, new_key(api, project_id=project, scopes=EVERY_SCOPE)["value"]) as own:
        yield own


@pytest.fixture(scope="module")
def b(api: httpx.Client, base_url: str) -> Iterator[httpx.Client]:
    project = new_project(api, "b")
    with api_of(base_url, new_key(api, project_id=project, scopes=EVERY_SCOPE)["value"]) as own:
        yield own


@pytest.fixture(scope="module")
def a_has(api: httpx.Client, a: httpx.Client, settings: Settings, fake_ray: FakeRay) -> dict[str, str]:
    """Creates one object of every kind that a path or a body can name, and other objects that lists show.

    Returns their names by the parameter of the path or body.
    """
    file_id = upload(a)
    job_id = a.post("/fine_tuning/jobs", json={**JOB, "training_file": file_id}).json()["id"]
    ticks(settings, 1)
    spool(settings, job_id, 1, reports(settings, job_id))
    fake_ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(settings, 2)
    job = a.get(f"/fine_tuning/jobs/{job_id}").json()
    assert job["status"] == "succeeded"
    events = a.get(f"/fine_tuning/jobs/{job_id}/events").json()["data"]
    checkpoints = a.get(f"/fine_tuning/jobs/{job_id}/checkpoints").json()["data"]
    key = a.get("/x/keys").json()["data"][0]
    with psycopg.connect(settings.database_url) as rows:
        used = (key["project_id"], key["id"])
        rows.execute("INSERT INTO usage VALUES (%s, %s, 'tiny', now(), 1, 1, 1, 0)", used)
    weights = storage.join(settings.storage_url, "runs", job_id, "export", "model.safetensors")
    storage.write_bytes(weights, b"weights")
    evaluation_id = a.post("/x/evaluations", json=EVALUATION).json()["id"]
    a.post(f"/x/evaluations/{evaluation_id}/cancel")  # so that it stays as it is
    of_policies = {"words": OF_A_SWEEP, "moved": {"kind": "drift", "rows": OF_A_SWEEP["rows"]}}
    sweep = {**SWEEP, "job": {**JOB, "training_file": file_id}, "evaluations": of_policies}
    sweep_id = a.post("/x/sweeps", json=sweep).json()["id"]
    deadline = time.monotonic() + 60
    while not a.get(f"/x/sweeps/{sweep_id}/trials").json()["data"]:
        assert time.monotonic() < deadline
    a.post(f"/x/sweeps/{sweep_id}/cancel")
    rounds_id = a.post("/x/rounds", json=ROUNDS).json()["id"]
    a.post(f"/x/rounds/{rounds_id}/cancel")
    sharing = f"/fine_tuning/checkpoints/{job['fine_tuned_model']}/permissions"
    shared = a.post(sharing, json={"project_ids": [new_project(api, "c")]}).json()["data"][0]
    return {
        "file_id": file_id,
        "job_id": job_id,
        "number": "1",
        "model_id": job["fine_tuned_model"],
        "evaluation_id": evaluation_id,
        "sweep_id": sweep_id,
        "rounds_id": rounds_id,
        "key_id": key["id"],
        "project_id": key["project_id"],
        "permission_id": shared["id"],
        "upload_id": a.post("/uploads", json=UPLOAD).json()["id"],
        "endpoint_id": a.post("/webhook_endpoints", json=HOOK).json()["id"],
        "feedback_id": a.post("/x/feedback", json=VOTE).json()["id"],
        "a result": job["result_files"][0],
        "an event": events[0]["id"],
        "a checkpoint": checkpoints[0]["id"],
        "a checkpoint's model": checkpoints[0]["fine_tuned_model_checkpoint"],
    }


def with_names(value: Any, words: dict[str, str]) -> Any:
    """Returns a part of a body with names in place of the words that stand for them."""
    if isinstance(value, dict):
        return {name: with_names(part, words) for name, part in value.items()}
    return words.get(value, value) if isinstance(value, str) else value


def ids_in(text: str, ids: dict[str, str]) -> set[str]:
    return {value for name, value in ids.items() if name != "number" and value in text}


def ask(client: httpx.Client, operation: Operation, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    url = str(client.base_url).removesuffix("/v1/") + path
    return client.request(operation.method, url, json=body)


def everything_of(client: httpx.Client, ids: dict[str, str]) -> dict[str, Any]:
    answers = {path: ask(client, each, path) for each in NAMED if each.method == "GET" for path in [each.filled(ids)]}
    assert {answer.status_code for answer in answers.values()} == {200}
    passing = r'"last_used_at":\w+|retry: [0-9]+'  # when a stream would be taken up again
    return {path: re.sub(passing, "", answer.text) for path, answer in answers.items()}


@pytest.fixture(scope="module")
def as_it_was(a: httpx.Client, a_has: dict[str, str]) -> dict[str, Any]:
    return everything_of(a, a_has)


@pytest.mark.slow
@each_of(NAMED)
def test_what_is_another_s_is_as_if_it_were_not(
    b: httpx.Client, a_has: dict[str, str], as_it_was: dict[str, Any], operation: Operation
) -> None:
    bodies = BODIES.get(str(operation), [(None, {})]) if operation in WITH_BODY else [(None, None)]
    nobody_s = {name: f"{value[:-6]}000000" if name != "number" else value for name, value in a_has.items()}
    for _, body in bodies:
        answer = ask(b, operation, operation.filled(a_has), body)
        absent = ask(b, operation, operation.filled(nobody_s), body)
        assert answer.status_code == absent.status_code == (409 if operation.path.startswith("/internal") else 404)
        said = answer.text
        for name, value in a_has.items():
            said = said.replace(value, nobody_s[name])
        assert said == absent.text


@each_of(LISTS)
def test_a_list_shows_what_is_one_s_own(
    a: httpx.Client, b: httpx.Client, a_has: dict[str, str], operation: Operation
) -> None:
    mine, theirs = ask(a, operation, operation.path), ask(b, operation, operation.path)
    assert (mine.status_code, theirs.status_code) == (200, 200)
    assert ids_in(mine.text, a_has), f"{operation}: let A own something that it lists"
    # B's refusals name what B asked for.
    shown = [
        each for each in theirs.json()["data"] if not isinstance(each, dict) or each.get("status") not in (403, 404)
    ]
    assert not ids_in(json.dumps(shown), a_has)
    for name in set(operation.parameters("query")) & set(a_has):
        filtered = ask(b, operation, f"{operation.path}?{name}={a_has[name]}")
        assert not ids_in(filtered.text, a_has)


@each_of(PAGED)
def test_a_page_does_not_begin_after_what_is_another_s(
    a: httpx.Client, b: httpx.Client, a_has: dict[str, str], operation: Operation
) -> None:
    path = operation.filled(a_has)
    last = ask(a, operation, path).json()["last_id"]
    assert last is not None
    assert ask(b, operation, f"{path}?after={last}").status_code in (400, 404)


@each_of(WITH_BODY)
def test_a_body_cannot_name_what_is_another_s(
    b: httpx.Client, a_has: dict[str, str], as_it_was: dict[str, Any], operation: Operation
) -> None:
    if str(operation) in TAKE_NO_IDS:
        return
    assert str(operation) in BODIES, f"{operation}: say in BODIES how B could name what is A's, or in TAKE_NO_IDS"
    if operation.parameters("path"):
        return  # asked above
    words = {**a_has, "its own": upload(b)}
    for field, body in BODIES[str(operation)]:
        answer = ask(b, operation, operation.path, with_names(body, words))
        assert answer.status_code in (400, 404), answer.text
        assert answer.json()["error"]["param"] == field


def test_after_all_that_nothing_of_a_has_changed(
    a: httpx.Client, a_has: dict[str, str], as_it_was: dict[str, Any]
) -> None:
    assert everything_of(a, a_has) == as_it_was
    assert len(json.dumps(as_it_was)) > 1000


@each_of([each for each in OPERATIONS if each.path.startswith("/v1")])
def test_every_route_wants_a_key_and_its_scope(
    api: httpx.Client, base_url: str, a_has: dict[str, str], operation: Operation
) -> None:
    path, needed = operation.filled(a_has), scopes.needed(operation.method, operation.path)
    body = {} if operation in WITH_BODY else None
    assert httpx.request(operation.method, f"{base_url}{path}", json=body).status_code == 401
    other = new_key(api, scopes=[scope for scope in EVERY_SCOPE if scope != needed])
    with api_of(base_url, other["value"]) as lacking:
        answer = ask(lacking, operation, path, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")


def test_every_change_is_answered_once_and_audited() -> None:
    """The class Once does both. The routes below only ask, so repeating them changes nothing."""
    asking = {f"POST /v1/{path}" for path in ("chat/completions", "completions", "x/datasets/check", "x/jobs/validate")}
    asking |= {"POST /v1/x/plans", "POST /v1/x/rewards"}
    asking.add("POST /v1/webhook_endpoints/{endpoint_id}/test")
    once = {
        f"{method} {route.path_format}"
        for route in APP.routes
        if isinstance(route, APIRoute)
        for method in route.methods
        if _idempotent in [dependency.call for dependency in route.dependant.dependencies]
    }
    assert {str(each) for each in CHANGES} - asking == once & {str(each) for each in CHANGES}

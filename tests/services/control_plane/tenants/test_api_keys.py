"""Tests the routes of API keys, and what each key may do."""

from typing import Any

import httpx
import openai
import psycopg
import pytest

from services.control_plane.auth.keys import SCOPES
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import api_of, new_key, new_project, pairs


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_key_is_told_once_and_works_at_once(api: httpx.Client, base_url: str) -> None:
    made = new_key(api, name="ci", scopes=["write", "read", "read"])
    key = made.pop("value")
    assert key.startswith("rd-")
    assert len(key) > 40
    assert made["redacted_value"] == f"rd-…{key[-4:]}"
    assert (made["object"], made["project_id"], made["scopes"]) == ("key", "proj_default", ["read", "write"])
    assert api.get(f"/x/keys/{made['id']}").json() == made
    assert made in api.get("/x/keys").json()["data"]
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0) as client:
        file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
        assert client.files.retrieve(file.id).id == file.id


def test_a_repeated_creation_makes_one_key_and_never_tells_it_again(api: httpx.Client, settings: Settings) -> None:
    def create() -> httpx.Response:
        return api.post("/x/keys", json={"name": "twice"}, headers={"Idempotency-Key": "a-key"})

    first, again = create().json(), create()
    assert again.json() == {**first, "value": None}
    assert again.headers["idempotent-replayed"] == "true"
    with psycopg.connect(settings.database_url) as connection:
        assert first["value"] not in str(connection.execute("SELECT * FROM answers").fetchall())


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_does_what_its_scope_names_and_nothing_else(api: httpx.Client, base_url: str, scope: str) -> None:
    requests = {
        "read": ("GET", "/files", None),
        "write": ("POST", "/fine_tuning/jobs/ftjob-none/cancel", None),
        "inference": ("POST", "/chat/completions", {"model": "none", "messages": []}),
        "admin": ("GET", "/x/keys", None),
    }
    with api_of(base_url, new_key(api, scopes=[scope])["value"]) as own:
        for needed, (method, path, body) in requests.items():
            answer = own.request(method, path, json=body)
            if needed == scope:
                assert answer.status_code in (200, 404), answer.text
            else:
                assert refusal(answer) == (403, "missing_scope")
                assert answer.json()["error"]["type"] == "permission_error"
                assert (
                    f"needs a key with the scope '{needed}', but your key has the scopes {scope}; "
                    "ask an admin for a key."
                ) in answer.text


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["read", "root"]}, "scopes.1"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"expires_at": 1}, "expires_at"),
        ({"expires": 1}, "expires"),
        ({"project_id": "proj_none"}, "project_id"),
    ],
)
def test_a_wrong_creation_is_refused_by_name(api: httpx.Client, changes: dict[str, Any], param: str) -> None:
    answer = api.post("/x/keys", json={"name": "wrong", **changes})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_an_admin_of_another_project_manages_its_own_keys_only(api: httpx.Client, base_url: str) -> None:
    ours = new_key(api)
    project = new_project(api, "keys of their own")
    admin = new_key(api, project_id=project, scopes=["admin"])
    with api_of(base_url, admin["value"]) as theirs:
        made = new_key(theirs)
        assert made["project_id"] == project
        assert [key["id"] for key in theirs.get("/x/keys").json()["data"]] == [made["id"], admin["id"]]
        for path in (f"/x/keys/{ours['id']}", f"/x/keys/{ours['id']}/revoke"):
            assert theirs.request("GET" if path.endswith(ours["id"]) else "POST", path).status_code == 404
        assert theirs.post("/x/keys", json={"name": "x", "project_id": "proj_default"}).status_code == 404
        assert theirs.get("/x/keys", params={"project_id": "proj_default"}).json()["data"] == []
    assert api.post(f"/x/keys/{made['id']}/revoke").status_code == 200

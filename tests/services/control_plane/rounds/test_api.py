"""Tests how rounds are answered, listed and deleted."""

from collections.abc import Callable
from typing import Any

import httpx
import psycopg
import pytest

from services.control_plane.rounds import rounds
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import EVERY_SCOPE, api_of, new_key, new_project
from tests.services.control_plane.evaluations.conftest import chats, until
from tests.services.control_plane.http.test_documented_answers import check
from tests.services.control_plane.rounds.conftest import ROUNDS, created, ended, look, reached

pytestmark = pytest.mark.usefixtures("policy")
ROUTE = "/x/rounds/{rounds_id}"


def test_rounds_and_their_list_are_what_the_document_describes(
    api: httpx.Client, train: Callable[[str], None], upload: Callable[[list[dict[str, Any]]], str]
) -> None:
    ranked = [[{"role": "assistant", "content": text}] for text in "ab"]
    file = upload([{**row, "completions": ranked, "ranks": [1, 2]} for row in chats(12)])
    body = ROUNDS | {"rows": None, "file": file, "num_rounds": 1}
    made = check("post", "/x/rounds", api.post("/x/rounds", json=body))
    assert made["request"]["file"] == file
    train(reached(api, made["id"], 1, "job"))
    ended(api, made["id"])
    done = check("get", ROUTE, api.get(f"/x/rounds/{made['id']}"))
    assert made["created_at"] <= done["finished_at"]
    listed = check("get", "/x/rounds", api.get("/x/rounds", params={"limit": 1}))
    assert [each["id"] for each in listed["data"]] == [made["id"]]
    assert api.get("/x/rounds", params={"status": "failed"}).json()["data"] == []


def test_deleted_rounds_leave_what_they_have_made(api: httpx.Client) -> None:
    made = created(api)
    samples = reached(api, made["id"], 1, "samples")
    refused = api.delete(f"/x/rounds/{made['id']}")
    assert (refused.status_code, "cancel them before" in refused.text) == (400, True)
    first = reached(api, made["id"], 0, "evaluations")["quality"]
    needed = api.delete(f"/x/evaluations/{first}")
    assert (needed.status_code, f"needed by the rounds {made['id']}" in needed.text) == (400, True)
    check("post", f"{ROUTE}/cancel", api.post(f"/x/rounds/{made['id']}/cancel"))
    assert api.delete(f"/x/rounds/{made['id']}").json() == {"id": made["id"], "object": "rounds", "deleted": True}
    assert api.get(f"/x/rounds/{made['id']}").json()["error"]["code"] == "rounds_not_found"
    assert api.get(f"/x/evaluations/{samples}").status_code == 200
    assert api.delete(f"/x/evaluations/{first}").status_code == 200


def test_a_project_has_only_so_many_rounds_at_once_and_is_archived_when_they_have_ended(
    api: httpx.Client, base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "MOST_LIVE", 1)
    project = new_project(api, "busy")
    with api_of(base_url, new_key(api, project_id=project, scopes=EVERY_SCOPE)["value"]) as busy:
        made = created(busy, model="tiny")
        refused = busy.post("/x/rounds", json=ROUNDS | {"model": "tiny"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "exceeded_quota")
        reached(busy, made["id"], 1, "job")
        archived = api.post(f"/x/projects/{project}/archive")
        assert archived.status_code == 400
        busy.post(f"/x/rounds/{made['id']}/cancel")
    until(lambda: api.post(f"/x/projects/{project}/archive").status_code == 200)  # its job may still run


def test_the_rows_of_a_round_count_as_bytes_of_the_project(api: httpx.Client, settings: Settings) -> None:
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        made = created(api)
        connection.execute("UPDATE projects SET max_bytes = 10")
        try:
            samples = reached(api, made["id"], 1, "samples")
            while "10 bytes" not in (look(api, made["id"])["waits_for"] or ""):
                assert look(api, made["id"])["rounds"][1]["file"] is None
        finally:
            connection.execute("UPDATE projects SET max_bytes = NULL")
    assert reached(api, made["id"], 1, "file")
    assert look(api, made["id"])["rounds"][1]["samples"] == samples
    api.post(f"/x/rounds/{made['id']}/cancel")

"""Tests what a client may ask for, and how evaluations, their items and their downloads are answered."""

import csv
import io
import json
import time
from typing import Any

import httpx
import psycopg
import pytest

from services.control_plane.evaluations import evaluations, work
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import EVERY_SCOPE, api_of, new_key, new_project
from tests.services.control_plane.evaluations.conftest import (
    POLICY,
    REWARD_MODEL,
    Engines,
    chats,
    created,
    ended,
    results,
    until,
)
from tests.services.control_plane.http.test_documented_answers import check

FAIR = {"type": "model", "model": "fair"}
COMPARE = {"kind": "compare", "model": POLICY, "judge": FAIR, "rows": chats(3)}
SCORE = {"kind": "score", "model": POLICY, "judge": {"type": "length"}, "rows": chats(3)}
pytestmark = pytest.mark.usefixtures("policy")


@pytest.mark.parametrize(
    ("body", "param", "code", "said"),
    [
        ({**COMPARE, "kind": "guess"}, "kind", "invalid_value", "'compare'"),
        ({**COMPARE, "judge": None}, "judge", "missing_required_parameter", "needs the field 'judge'"),
        ({**COMPARE, "rows": None}, "file", "missing_required_parameter", "either 'file' or 'rows'"),
        ({**COMPARE, "file": "file-1"}, "file", "missing_required_parameter", "either 'file' or 'rows'"),
        ({**COMPARE, "rows": None, "file": "file-1"}, "file", "file_not_found", "No such File"),
        ({**COMPARE, "model": "tiny"}, "baseline", "missing_required_parameter", "'tiny' is a base model"),
        ({**COMPARE, "baseline": POLICY}, "baseline", "invalid_value", "name two models"),
        ({**COMPARE, "baseline": "nobody"}, "baseline", "model_not_found", "does not exist"),
        (
            {**COMPARE, "judge": {"type": "model", "model": "nobody"}},
            "judge.model",
            "model_not_found",
            "does not exist",
        ),
        ({**COMPARE, "judge": {"type": "model"}}, "judge", "invalid_value", "needs the field 'model'"),
        ({**COMPARE, "judge": {"type": "length", "pattern": "a"}}, "judge", "invalid_value", "has no field 'pattern'"),
        ({**COMPARE, "judge": {"type": "regex", "pattern": "(?=a)"}}, "judge", "invalid_value", "RE2 can read"),
        ({**COMPARE, "judge": {"type": "exact"}}, "rows", "invalid_value", "no completion for the rule 'exact'"),
        ({**COMPARE, "rows": [{"prompt": 7}]}, "rows.0.prompt", "invalid_value", "rows.0.prompt"),
        (
            {**COMPARE, "rows": [{"prompt": [{"role": "user", "content": "A"}], "completions": [3]}]},
            "rows.0.completions.0",
            "invalid_value",
            "",
        ),
        (
            {**COMPARE, "sampling": {"temperature": 3}},
            "sampling.temperature",
            "invalid_value",
            "less than or equal to 2",
        ),
        ({**SCORE, "baseline": "tiny"}, "baseline", "unknown_parameter", "kind 'score' has no field 'baseline'"),
        ({**SCORE, "model": REWARD_MODEL}, "model", "invalid_value", "cannot write answers"),
        (
            {**COMPARE, "judge": {"type": "model", "model": REWARD_MODEL, "criteria": "Be kind."}},
            "judge.criteria",
            "invalid_value",
            "reads no criteria",
        ),
        ({**SCORE, "colour": "red"}, "colour", "unknown_parameter", "colour"),
    ],
)
def test_a_request_that_cannot_work_is_refused_by_its_field(
    api: httpx.Client, body: dict[str, Any], param: str, code: str, said: str
) -> None:
    answer = api.post("/x/evaluations", json=body)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404)
    assert (error["param"], error["code"]) == (param, code), error
    assert said in error["message"]


@pytest.mark.parametrize(
    ("judge", "value"),
    [({"type": "length"}, 3), ({"type": "regex", "pattern": "answer [13]$"}, 0.5), ({"type": "exact"}, 0.25)],
)
def test_a_rule_scores_the_answers_of_a_model(api: httpx.Client, judge: dict[str, str], value: float) -> None:
    rows = [{"prompt": f"Question {number}", "completions": ["good answer 2"]} for number in range(4)]
    found = results(api, **SCORE | {"judge": judge, "rows": rows})
    assert found["score"]["value"] == value
    assert found["score"]["low"] <= value <= found["score"]["high"]
    assert found["answers"]["model"] == {"mean_characters": 13, "mean_tokens": 3, "repetition": 0, "unfinished": 0}


def test_an_evaluation_its_list_and_its_items_are_what_the_document_describes(api: httpx.Client) -> None:
    route = "/x/evaluations"
    made = check("post", route, api.post(route, json=COMPARE))
    assert (made["status"], made["progress"], made["results"]) == ("queued", 0, None)
    assert made["request"]["baseline"] == "tiny"
    done = check("get", f"{route}/{{evaluation_id}}", ended_answer(api, made["id"]))
    assert (done["num_items"], done["num_completed"], done["num_failed"], done["progress"]) == (3, 3, 0, 1)
    assert made["created_at"] <= done["started_at"] <= done["finished_at"]
    listed = check("get", route, api.get(route, params={"limit": 1}))
    assert [each["id"] for each in listed["data"]] == [made["id"]]
    assert api.get(route, params={"status": "failed"}).json()["data"] == []
    items = f"{route}/{{evaluation_id}}/items"
    first = check("get", items, api.get(f"{route}/{made['id']}/items", params={"limit": 2}))
    rest = check("get", items, api.get(f"{route}/{made['id']}/items", params={"after": first["last_id"]}))
    assert [item["id"] for item in first["data"] + rest["data"]] == ["0", "1", "2"]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert rest["data"][0]["found"]["outcome"] == "win"


def ended_answer(api: httpx.Client, evaluation_id: str) -> httpx.Response:
    ended(api, evaluation_id)
    return api.get(f"/x/evaluations/{evaluation_id}")


def test_items_are_downloaded_as_json_lines_and_as_csv(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.control_plane.evaluations.api.READ_AT_ONCE", 2)
    made = created(api, **COMPARE)
    ended(api, made["id"])
    lines = api.get(f"/x/evaluations/{made['id']}/content").text.splitlines()
    listed = api.get(f"/x/evaluations/{made['id']}/items").json()["data"]
    assert [json.loads(line) for line in lines] == listed
    table = api.get(f"/x/evaluations/{made['id']}/content", params={"format": "csv"})
    assert table.headers["content-disposition"] == f'attachment; filename="{made["id"]}.csv"'
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert [row["found.answer.text"] for row in rows] == [item["found"]["answer"]["text"] for item in listed]
    assert [row["found.outcome"] for row in rows] == ["win"] * 3
    assert json.loads(rows[0]["found.verdicts"]) == ["first", "first"]


def test_a_cancelled_evaluation_keeps_what_was_found_and_ends_once(api: httpx.Client, engines: Engines) -> None:
    engines.delay = 0.05
    made = created(api, **COMPARE | {"rows": chats(200)})
    while not api.get(f"/x/evaluations/{made['id']}").json()["num_completed"] and len(engines.asked) < 30:
        pass
    cancelled = check("post", "/x/evaluations/{evaluation_id}/cancel", api.post(f"/x/evaluations/{made['id']}/cancel"))
    assert (cancelled["status"], cancelled["results"]) == ("cancelled", None)
    assert 0 < cancelled["progress"] < 1
    again = api.post(f"/x/evaluations/{made['id']}/cancel")
    assert (again.status_code, "has ended (cancelled)" in again.text) == (400, True)
    answers = [item["found"] for item in api.get(f"/x/evaluations/{made['id']}/items").json()["data"]]
    assert any("answer" in found for found in answers)


def test_a_paused_evaluation_asks_nothing_and_goes_on_where_it_was(api: httpx.Client, engines: Engines) -> None:
    engines.delay = 0.02
    made, route = created(api, **SCORE | {"rows": chats(60)}), "/x/evaluations/{evaluation_id}"
    until(lambda: api.get(f"/x/evaluations/{made['id']}").json()["progress"] > 0.1)
    paused = check("post", f"{route}/pause", api.post(f"/x/evaluations/{made['id']}/pause"))
    assert (paused["status"], paused["waits_for"]) == ("paused", None)
    assert api.post(f"/x/evaluations/{made['id']}/pause").json()["status"] == "paused"
    assert until(lambda: quiet(engines)) < 60
    check("post", f"{route}/resume", api.post(f"/x/evaluations/{made['id']}/resume"))
    found = ended(api, made["id"])
    assert (found["status"], found["num_completed"]) == ("succeeded", 60)
    assert len(engines.asked) <= 60 + 2 * work.ITEMS_AT_ONCE  # those that were on their way
    for wish in ("pause", "resume"):
        refused = api.post(f"/x/evaluations/{made['id']}/{wish}")
        assert (refused.status_code, "succeeded" in refused.text) == (400, True)


def quiet(engines: Engines) -> int:
    """Returns how often the engines were asked, if they were not asked for a second; else 0."""
    before = len(engines.asked)
    time.sleep(1)
    return before if len(engines.asked) == before else 0


def test_a_deleted_evaluation_is_gone_with_its_items(api: httpx.Client, engines: Engines, settings: Settings) -> None:
    engines.delay = 0.2
    made = created(api, **SCORE)
    refused = api.delete(f"/x/evaluations/{made['id']}")
    assert (refused.status_code, "cancel it before" in refused.text) == (400, True)
    ended(api, made["id"])
    deleted = api.delete(f"/x/evaluations/{made['id']}").json()
    assert deleted == {"id": made["id"], "object": "evaluation", "deleted": True}
    assert api.get(f"/x/evaluations/{made['id']}").status_code == 404
    with psycopg.connect(settings.database_url) as connection:
        query = "SELECT count(*) FROM evaluation_items WHERE evaluation_id = %s"
        assert connection.execute(query, (made["id"],)).fetchone() == (0,)


def test_a_project_has_only_so_many_evaluations_at_once(
    api: httpx.Client, base_url: str, monkeypatch: pytest.MonkeyPatch, engines: Engines
) -> None:
    monkeypatch.setattr(evaluations, "MOST_LIVE", 1)
    engines.delay = 0.2
    project = new_project(api, "busy")
    with api_of(base_url, new_key(api, project_id=project, scopes=EVERY_SCOPE)["value"]) as busy:
        body = SCORE | {"model": "tiny", "rows": chats(40)}
        made = created(busy, **body)
        refused = busy.post("/x/evaluations", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "exceeded_quota")
        created(api, **SCORE)  # another project is not concerned
        assert api.get(f"/x/evaluations/{made['id']}").status_code == 404
        busy.post(f"/x/evaluations/{made['id']}/cancel")
        ended(busy, created(busy, **body | {"rows": chats(1)})["id"])


def test_rows_that_are_too_large_together_are_refused(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.control_plane.evaluations.rows.MOST_BYTES", 100)
    answer = api.post("/x/evaluations", json=SCORE)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_items")


def test_its_tokens_count_as_those_of_its_key(api: httpx.Client, base_url: str, settings: Settings) -> None:
    key = new_key(api, scopes=EVERY_SCOPE)
    with api_of(base_url, key["value"]) as own:
        results(own, **COMPARE)
    query = "SELECT model_id, num_requests, completion_tokens FROM usage WHERE key_id = %s"
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        until(lambda: sum(row[1] for row in connection.execute(query, (key["id"],))) == 12)
        rows = connection.execute(query, (key["id"],)).fetchall()
    assert {row[0]: row[1:] for row in rows} == {POLICY: (3, 9), "tiny": (3, 15), "fair": (6, 6)}

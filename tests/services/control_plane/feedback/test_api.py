"""Tests that votes become rows of training files, which the service's own check and its jobs accept."""

import json
from typing import Any

import httpx
import pytest

from tests.services.control_plane.conftest import API_KEY, EVERY_SCOPE, api_of, new_key, new_project

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where do I find a red saw?"}]
GOOD, BAD = {"completion": "Aisle four.", "model": "ft:tiny:a::1"}, {"completion": "No idea.", "model": "tiny"}
SAID = {text: [{"role": "assistant", "content": text}] for text in ("Aisle four.", "No idea.", "Aisle four, left.")}

VOTES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "choice": (
        {"completions": [BAD, GOOD], "choice": 1},
        "pairs",
        {"chosen": SAID["Aisle four."], "rejected": SAID["No idea."], "models": ["ft:tiny:a::1", "tiny"]},
    ),
    "edit": (
        {"completions": [GOOD], "edit": "Aisle four, left."},
        "pairs",
        {"chosen": SAID["Aisle four, left."], "rejected": SAID["Aisle four."], "models": [None, "ft:tiny:a::1"]},
    ),
    "thumb": (
        {"completions": [BAD], "thumb": "down"},
        "unpaired",
        {"completion": SAID["No idea."], "label": False, "models": ["tiny"]},
    ),
    "ratings": (
        {"completions": [GOOD, BAD], "ratings": [4, 1.5]},
        "ratings",
        {
            "completions": [SAID["Aisle four."], SAID["No idea."]],
            "scores": [4, 1.5],
            "models": ["ft:tiny:a::1", "tiny"],
        },
    ),
}


def vote(api: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = api.post("/x/feedback", json={"prompt": CHAT, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.fixture
def project(api: httpx.Client, base_url: str, request: pytest.FixtureRequest) -> Any:
    """A project without votes."""
    key = new_key(api, project_id=new_project(api, request.node.name[:64]), scopes=EVERY_SCOPE)
    with api_of(base_url, key["value"]) as own:
        yield own


@pytest.mark.parametrize("name", VOTES)
def test_a_vote_becomes_a_row_that_names_the_models(api: httpx.Client, name: str) -> None:
    body, kind, wanted = VOTES[name]
    made = vote(api, **body)
    assert (made["object"], made["vote"], made["kind"], made["form"]) == ("feedback", name, kind, "messages")
    models = wanted["models"]
    rest = {column: value for column, value in wanted.items() if column != "models"}
    assert made["row"] == {"prompt": CHAT, **rest, "feedback": {"id": made["id"], "models": models}}
    assert api.get(f"/x/feedback/{made['id']}").json() == made


@pytest.mark.parametrize("prompt", ["Where do I find a red saw?", CHAT], ids=["text", "messages"])
@pytest.mark.parametrize("name", VOTES)
def test_a_file_of_votes_is_checked_and_taken_by_a_job(project: httpx.Client, name: str, prompt: Any) -> None:
    body, kind, _ = VOTES[name]
    form = "text" if isinstance(prompt, str) else "messages"
    made = [vote(project, **body, prompt=prompt)["row"] for _ in range(10)]
    answer = project.post("/x/feedback/files", json={"kind": kind, "form": form})
    assert answer.status_code == 200, answer.text
    file = answer.json()
    report = file["x_raydpo"]["report"]
    assert (file["purpose"], file["status"], file["filename"][:9]) == ("fine-tune", "processed", "feedback-")
    assert (report["kind"], report["num_rows"], report["problems"]) == (kind, 10, [])
    assert report["ignored_keys"] == ["feedback"]
    lines = project.get(f"/files/{file['id']}/content").text.splitlines()
    assert [json.loads(line) for line in lines] == made
    method = "kto" if kind == "unpaired" else "dpo"
    job = {"model": "tiny", "training_file": file["id"], "method": {"type": method}}
    assert project.post("/x/jobs/validate", json=job).status_code == 200


def test_votes_are_listed_newest_first_and_counted_by_kind_and_form(project: httpx.Client) -> None:
    made = [vote(project, **VOTES[name][0])["id"] for name in ("choice", "edit", "thumb")]
    made.append(vote(project, **VOTES["choice"][0], prompt="Hello?")["id"])
    first = project.get("/x/feedback", params={"limit": 3}).json()
    assert [each["id"] for each in first["data"]] == made[:0:-1]
    assert first["counts"] == [
        {"kind": "pairs", "form": "messages", "num_votes": 2},
        {"kind": "pairs", "form": "text", "num_votes": 1},
        {"kind": "unpaired", "form": "messages", "num_votes": 1},
    ]
    rest = project.get("/x/feedback", params={"after": first["last_id"]}).json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([made[0]], False)
    texts = project.get("/x/feedback", params={"kind": "pairs", "form": "text"}).json()
    assert [each["id"] for each in texts["data"]] == [made[3]]


def test_a_file_of_no_votes_is_refused(project: httpx.Client) -> None:
    answer = project.post("/x/feedback/files", json={"kind": "ratings"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "kind")
    assert "no feedback of the kind 'ratings'" in answer.json()["error"]["message"]


def test_a_vote_that_is_sent_again_counts_once(project: httpx.Client, base_url: str) -> None:
    body = {"prompt": CHAT, **VOTES["choice"][0]}
    answers = [project.post("/x/feedback", json=body, headers={"idempotency-key": "one"}) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    assert project.get("/x/feedback").json()["counts"][0]["num_votes"] == 1
    key = {"idempotency-key": "file"}
    files = [project.post("/x/feedback/files", json={"kind": "pairs"}, headers=key).json()["id"] for _ in range(2)]
    assert files[0] == files[1]
    assert [file["id"] for file in project.get("/files").json()["data"]] == files[:1]


def test_an_unknown_vote_is_not_found(api: httpx.Client) -> None:
    for ask in (api.get, api.delete):
        answer = ask("/x/feedback/fb-none")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "feedback_not_found")
    assert API_KEY not in answer.text

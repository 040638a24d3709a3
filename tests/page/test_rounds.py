"""The list of rounds, and one set of rounds: its curves, its stages, and what each round made, side by side."""

import json
import re
from typing import Any

import httpx
import psycopg
import pytest
from playwright.sync_api import Page, expect

from tests.page.browsing import look_at, sign_in, submit
from tests.page.conftest import Service

pytestmark = pytest.mark.slow

PROMPTS = [{"prompt": f"Do you have a red saw, number {number}?"} for number in range(12)]
SCORES = [0.43, 0.75, 0.94]
ROUNDS: dict[str, Any] = {
    "model": "tiny",
    "rows": PROMPTS,
    "num_rounds": 2,
    "num_samples": 2,
    "judge": {"type": "regex", "pattern": "^Gladly"},
    "selection": {"type": "rso"},
}
ROWS = [
    {"prompt": row["prompt"], "chosen": "Gladly, aisle 3.", "rejected": "It is in aisle 3.", "score_chosen": 1.0}
    for row in PROMPTS
]


def estimate(value: float, around: float) -> dict[str, float]:
    return {"value": value, "low": value - around, "high": value + around}


def evaluation(api: httpx.Client, connection: psycopg.Connection[Any], kind: str, found: dict[str, Any]) -> str:
    """Returns the id of an evaluation that has ended, of which each item has found the same."""
    more = {"judge": ROUNDS["judge"]} | ({"num_samples": 2} if kind == "samples" else {})
    made = api.post("/x/evaluations", json={"kind": kind, "model": "tiny", "rows": PROMPTS, **more})
    assert made.status_code == 200, made.text
    of_it = str(made.json()["id"])
    ends = "state = 'succeeded', finished_at = now(), num_completed = num_items, results = '{}', waits_for = NULL"
    connection.execute(f"UPDATE evaluations SET {ends} WHERE id = %s", (of_it,))
    items = "UPDATE evaluation_items SET found = %s, error = NULL WHERE evaluation_id = %s"
    connection.execute(items, (json.dumps(found), of_it))
    return of_it


def created(api: httpx.Client, service: Service) -> str:
    """Returns the id of rounds that wait for an engine."""
    service.engine.is_full = True
    made = api.post("/x/rounds", json=ROUNDS)
    assert made.status_code == 200, made.text
    return str(made.json()["id"])


@pytest.fixture(scope="module")
def rounds_id(service: Service, api: httpx.Client, database_url: str) -> str:
    """Rounds that have ended. No engine here answers them, so what they made is written into the database."""
    body = "\n".join(map(json.dumps, ROWS)).encode()
    file = api.post("/files", files={"file": ("rounds.jsonl", body)}, data={"purpose": "fine-tune"}).json()["id"]
    job = submit(api, file)
    made = created(api, service)
    assert api.post(f"/x/rounds/{made}/cancel").status_code == 200

    def answer(text: str) -> dict[str, Any]:
        return {"text": text, "num_tokens": 3, "is_finished": True}

    sampled = {"answers": [answer("Gladly, aisle 3."), answer("It is in aisle 3.")], "scores": [1.0, 0.0]}
    rows = {"num_answers": 24, "num_ties": 2, "num_failed": 1, "num_rows": 12}
    with psycopg.connect(database_url, autocommit=True) as connection:
        history = list[dict[str, Any]]()
        for number, score in enumerate(SCORES):
            quality = evaluation(api, connection, "score", {"answer": answer(f"Gladly, {number}."), "score": score})
            results: dict[str, Any] = {"score": estimate(score, 0.06), "win_rate": None, "kl": None, "num_failed": 0}
            entry = {"number": number, "model": "tiny", "evaluations": {"quality": quality}, "results": results}
            if number:
                accepted = {"num_tried": 20 * number, "num_accepted": 16}
                results["kl"] = estimate(0.3 * number, 0.07)
                entry |= {"samples": evaluation(api, connection, "samples", sampled), "rows": rows | accepted}
                entry |= {"file": file, "job": job}
            history.append(entry)
        ends = "state = 'succeeded', end_reason = 'num_rounds', history = %s"
        connection.execute(f"UPDATE rounds SET {ends} WHERE id = %s", (json.dumps(history), made))
    service.engine.is_full = False
    return made


def test_rounds_show_their_curves_and_lead_to_what_they_made(page: Page, service: Service, rounds_id: str) -> None:
    sign_in(page)
    page.get_by_role("navigation", name="Views").get_by_role("link", name="Rounds").click()
    row = page.get_by_role("row").filter(has_text=rounds_id)
    expect(row).to_contain_text("2 of 2")
    expect(row).to_contain_text("Round 2: score 0.94 (0.88 to 1)")
    look_at(page, "all-rounds")
    row.get_by_role("link", name="tiny").click()
    for curve in (
        "Score: policy from 0.43 to 0.94; 3 points, rounds 0 to 2",
        "KL from the first policy: policy from 0.3 to 0.6; 3 points, rounds 0 to 2",
        "Acceptance: answers from 80.0 % to 40.0 %; 3 points, rounds 0 to 2",
        "Rows: rows from 12 to 12, ties from 2 to 2; 3 points, rounds 0 to 2",
    ):
        expect(page.get_by_role("figure", name=curve)).to_be_visible()
    table = page.get_by_role("table")
    expect(table.get_by_role("row")).to_have_count(4)
    last = table.get_by_role("row").last
    expect(last).to_contain_text("the best")
    expect(last).to_contain_text("12 rows")
    expect(last).to_contain_text("left out: 2 ties, 1 prompt without answers")
    for name, place in (("12 rows", "#/data/file-"), ("ftjob-", "#/jobs/ftjob-"), ("tiny", "#/models/tiny")):
        expect(last.get_by_role("link", name=name)).to_have_attribute("href", re.compile(f"^{place}"))
    for name in ("samples", "quality"):
        link = last.get_by_role("link", name=name)
        expect(link).to_have_attribute("href", re.compile("^#/evaluations/evaluation-"))
    look_at(page, "rounds")


def test_what_each_round_made_is_read_side_by_side(page: Page, service: Service, rounds_id: str) -> None:
    sign_in(page)
    page.goto(f"{service.url}/#/rounds/{rounds_id}")
    made = page.get_by_role("region", name="What a round made")
    first = made.get_by_role("article", name="Line 1", exact=True)
    expect(first).to_contain_text("Gladly, aisle 3.")
    expect(first).to_contain_text("It is in aisle 3.")
    made.get_by_role("link", name="Further rows").click()
    expect(made.get_by_role("article")).to_have_count(2)
    made.get_by_role("link", name="Samples and their scores").click()
    expect(made.get_by_role("article")).to_have_count(10)
    expect(first).to_contain_text("answer 1 (better)")
    expect(first).to_contain_text("scores 1, 0")
    made.get_by_role("link", name="Verdicts on the policy").click()
    expect(first).to_contain_text("Gladly, 2.")
    made.get_by_label("Round").select_option("0")
    expect(first).to_contain_text("Gladly, 0.")
    expect(made.get_by_role("link", name="Rows")).to_have_count(0)
    page.reload()
    expect(first).to_contain_text("Gladly, 0.")
    look_at(page, "rounds-verdicts")


def test_rounds_are_paused_resumed_cancelled_and_deleted(page: Page, service: Service, api: httpx.Client) -> None:
    made = created(api, service)
    try:
        sign_in(page)
        page.goto(f"{service.url}/#/rounds/{made}")
        status = page.locator(".heading .status")
        expect(status).to_have_text("running")
        page.get_by_role("button", name="Pause").click()
        expect(status).to_have_text("paused")
        page.get_by_role("button", name="Resume").click()
        expect(status).to_have_text("running")
        page.get_by_role("button", name="Cancel the rounds").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the rounds").click()
        expect(status).to_have_text("cancelled")
        page.get_by_role("button", name="Delete the rounds").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete the rounds").click()
        expect(page).to_have_url(f"{service.url}/#/rounds")
        expect(page.get_by_role("heading", name="Rounds")).to_be_visible()
        expect(page.get_by_role("row").filter(has_text=made)).to_have_count(0)
    finally:
        service.engine.is_full = False
    page.goto(f"{service.url}/#/rounds/{made}")
    expect(page.get_by_role("alert")).to_contain_text(f"There are no rounds '{made}'")


def test_rounds_are_made_in_a_form(page: Page, service: Service, api: httpx.Client, file_id: str) -> None:
    sign_in(page)
    page.get_by_role("navigation", name="Views").get_by_role("link", name="Rounds").click()
    page.get_by_role("link", name="New rounds").click()
    page.locator("[id='model']").select_option("tiny")
    page.get_by_label("num_rounds").fill("2")
    page.locator("[id='file']").select_option(file_id)
    page.locator("[id='judge.type']").select_option("regex")
    page.locator("[id='judge.pattern']").fill("^Gladly")
    page.locator("[id='selection.type']").select_option("rso")
    page.get_by_label("num_accepted").fill("3")
    beta = page.locator("[id='job.method.dpo.hyperparameters.beta']")
    beta.fill("5")
    page.get_by_role("button", name="Create the rounds").click()
    expect(page.locator(".field", has=beta)).to_contain_text("beta is 5.0; it must be greater than 0 and at most 2.")
    expect(beta).to_be_focused()
    look_at(page, "new-rounds")
    beta.fill("0.2")
    service.engine.is_full = True
    try:
        page.keyboard.press("Enter")
        expect(page).to_have_url(re.compile(r"#/rounds/rounds-\w+$"))
        expect(page.get_by_role("heading", name="Rounds")).to_be_visible()
        request = api.post(f"/x/rounds/{page.url.rpartition('/')[2]}/cancel").json()["request"]
    finally:
        service.engine.is_full = False
    assert (request["model"], request["file"], request["num_rounds"]) == ("tiny", file_id, 2)
    assert request["judge"].items() >= {"type": "regex", "pattern": "^Gladly"}.items()
    assert request["selection"].items() >= {"type": "rso", "num_accepted": 3}.items()
    assert request["job"] == {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}}

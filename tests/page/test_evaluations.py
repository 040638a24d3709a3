"""The list of evaluations, and one: its results, and its items with both answers side by side."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from playwright.sync_api import Page, expect

from services.control_plane.evaluations.requests import OF_ALL_KINDS, OF_JUDGE, OF_KIND
from tests.page.browsing import look_at, open_job, sign_in, submit, wait_until_ended
from tests.page.conftest import Service
from tests.services.control_plane.conftest import pairs

pytestmark = pytest.mark.slow

ROWS = [{"prompt": f"Do you have a red saw, number {number}?"} for number in range(12)]
COMPARE = {"kind": "compare", "model": "tiny", "baseline": "small", "judge": {"type": "length"}, "rows": ROWS}
RESULTS = {
    "win_rate": {"value": 0.5, "low": 0.25, "high": 0.75},
    "num_wins": 4,
    "agreement": None,
    "answers": {"model": {"mean_tokens": 3.0, "unfinished": 0.25}},
}


def answer(text: str, *, is_finished: bool = True) -> dict[str, Any]:
    return {"text": text, "num_tokens": 3, "is_finished": is_finished}


@pytest.fixture(scope="module")
def evaluation_id(api: httpx.Client, database_url: str) -> str:
    """An evaluation that has ended. No engine here answers it, so what it found is written into the database."""
    made = api.post("/x/evaluations", json=COMPARE).json()
    better = {"answer": answer("Gladly, <b>aisle 3</b>."), "baseline_answer": answer("Aisle", is_finished=False)}
    split = {"answer": answer("Yes."), "baseline_answer": answer("")}
    with psycopg.connect(database_url, autocommit=True) as connection:
        ends = "state = 'succeeded', finished_at = now(), num_completed = 11, num_failed = 1, num_stages_done = 36"
        of_it = (json.dumps(RESULTS), made["id"])
        connection.execute(f"UPDATE evaluations SET {ends}, waits_for = NULL, results = %s WHERE id = %s", of_it)
        items = "UPDATE evaluation_items SET stage = 3, found = %s, error = NULL WHERE evaluation_id = %s"
        connection.execute(items, (json.dumps({**better, "verdicts": ["first"]}), made["id"]))
        items = f"{items} AND number = %s"
        connection.execute(items, (json.dumps({**split, "verdicts": ["first", "second"]}), made["id"], 1))
        error = json.dumps({"code": None, "message": "The prompt is too long."})
        failed = (
            "UPDATE evaluation_items SET stage = 0, found = '{}', error = %s WHERE evaluation_id = %s AND number = 2"
        )
        connection.execute(failed, (error, made["id"]))
    return str(made["id"])


def test_an_evaluation_shows_its_results_and_both_answers(
    page: Page, service: Service, evaluation_id: str, tmp_path: Path
) -> None:
    sign_in(page)
    page.get_by_role("link", name="Evaluations").click()
    row = page.get_by_role("row").filter(has_text=evaluation_id)
    expect(row).to_contain_text("win rate 50.0 % (25.0 % to 75.0 %)")
    look_at(page, "evaluations")
    row.get_by_role("link", name="compare").click()
    expect(page.get_by_role("row").filter(has_text="answers model unfinished")).to_contain_text("25.0 %")
    expect(page.get_by_text("1 item failed; the results leave them out.")).to_be_visible()
    first, second, third = (page.get_by_role("article", name=f"Line {line}", exact=True) for line in (1, 2, 3))
    expect(first).to_contain_text("The model's answer is better")
    expect(first).to_contain_text("Gladly, <b>aisle 3</b>.")
    expect(first).to_contain_text("Cut off after 3 tokens.")
    expect(second).to_contain_text("the judge said the model's, and with the answers swapped the baseline's")
    expect(second).to_contain_text("The model wrote nothing.")
    expect(third).to_contain_text("The prompt is too long.")
    look_at(page, "evaluation")
    page.get_by_role("link", name="Further items").click()
    expect(page.get_by_role("article")).to_have_count(2)
    page.reload()
    expect(page.get_by_role("article")).to_have_count(2)
    page.get_by_role("link", name="First items").click()
    expect(page.get_by_role("article")).to_have_count(10)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    assert download.value.suggested_filename == f"{evaluation_id}.csv"
    download.value.save_as(tmp_path / "items.csv")
    with (tmp_path / "items.csv").open(newline="") as file:
        items = list(csv.DictReader(file))
    assert len(items) == len(ROWS)
    assert items[0]["found.answer.text"] == "Gladly, <b>aisle 3</b>."


def end(database_url: str, evaluation_id: str, results: dict[str, Any], found: dict[str, Any]) -> None:
    """Ends an evaluation, in whose database rows it writes these results, and what each item found."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        ends = "state = 'succeeded', finished_at = now(), num_completed = num_items, waits_for = NULL, results = %s"
        connection.execute(f"UPDATE evaluations SET {ends} WHERE id = %s", (json.dumps(results), evaluation_id))
        items = "UPDATE evaluation_items SET stage = 2, found = %s, error = NULL WHERE evaluation_id = %s"
        connection.execute(items, (json.dumps(found), evaluation_id))


def test_preferences_show_the_completions_that_were_compared(
    page: Page, service: Service, api: httpx.Client, database_url: str
) -> None:
    rows = [{"prompt": "Where is the saw?", "completions": ["Gladly, <b>aisle 3</b>.", "Look for it."]}]
    body = {"kind": "preferences", "model": "tiny", "reference": "small", "beta": 0.1, "rows": rows}
    made = api.post("/x/evaluations", json=body).json()
    end(database_url, made["id"], {"accuracy": RESULTS["win_rate"]}, {"rewards": [0.25, 0.5], "is_right": False})
    sign_in(page)
    page.goto(f"{service.url}/#/evaluations/{made['id']}")
    item = page.get_by_role("article", name="Line 1", exact=True)
    expect(item).to_contain_text("completion 1 (preferred)Gladly, <b>aisle 3</b>.")
    expect(item).to_contain_text("completion 2 Look for it.")
    expect(item).to_contain_text("rewards 0.25, 0.5")


def test_the_list_shows_the_mean_score_of_samples(
    page: Page, service: Service, api: httpx.Client, database_url: str
) -> None:
    made = api.post(
        "/x/evaluations", json={"kind": "samples", "model": "tiny", "judge": {"type": "length"}, "rows": ROWS}
    )
    score = {"value": 4.5, "low": 4.25, "high": 5}
    end(database_url, made.json()["id"], {"score": score, "best": score}, {})
    sign_in(page)
    page.goto(f"{service.url}/#/evaluations")
    expect(page.get_by_role("row").filter(has_text=made.json()["id"])).to_contain_text("score 4.5 (4.25 to 5)")


def test_an_evaluation_is_paused_resumed_cancelled_and_deleted(page: Page, service: Service, api: httpx.Client) -> None:
    service.engine.is_full = True
    try:
        made = api.post("/x/evaluations", json=COMPARE).json()
        sign_in(page)
        page.goto(f"{service.url}/#/evaluations/{made['id']}")
        status = page.locator(".heading .status")
        page.get_by_role("button", name="Pause").click()
        expect(status).to_have_text("paused")
        page.get_by_role("button", name="Resume").click()
        expect(status).to_have_text("running")
        page.get_by_role("button", name="Cancel the evaluation").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the evaluation").click()
        expect(status).to_have_text("cancelled")
        expect(page.get_by_role("button", name="Cancel the evaluation")).to_have_count(0)
        page.get_by_role("button", name="Delete the evaluation").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete the evaluation").click()
        expect(page.get_by_role("heading", name="Evaluations")).to_be_visible()
        expect(page.get_by_role("row").filter(has_text=made["id"])).to_have_count(0)
    finally:
        service.engine.is_full = False
    page.goto(f"{service.url}/#/evaluations/none")
    expect(page.get_by_role("alert")).to_contain_text("There is no evaluation 'none'")


@pytest.fixture
def form(page: Page) -> Page:
    sign_in(page)
    page.get_by_role("link", name="Evaluations").click()
    page.get_by_role("link", name="New evaluation").click()
    expect(page.get_by_role("heading", name="New evaluation")).to_be_visible()
    return page


def test_an_evaluation_is_made_in_a_form(form: Page, service: Service, api: httpx.Client) -> None:
    page = form
    page.locator("[id='model']").select_option("tiny")
    page.get_by_label("baseline").select_option("small")
    prompts = 'Where is the saw?\n{"prompt": "Hi", "completions": ["Hello", "No"]}'
    page.get_by_label("Or write the prompts here").fill(prompts)
    page.get_by_role("button", name="Create the evaluation").click()
    judge = page.get_by_role("group", name="Judge")
    expect(judge).to_contain_text("An evaluation of the kind 'compare' needs the field 'judge'.")
    expect(judge).to_be_focused()
    look_at(page, "new-evaluation-refused")
    page.get_by_label("type", exact=True).select_option("regex")
    page.get_by_label("pattern").fill("^Gladly")
    page.get_by_text("More options").click()
    tokens = page.get_by_label("max_tokens")
    tokens.fill("0")
    page.keyboard.press("Enter")
    expect(page.locator(".field", has=tokens).last).to_contain_text("greater than or equal to 1")
    expect(tokens).to_be_focused()
    tokens.fill("64")
    page.keyboard.press("Tab")
    page.reload()  # the draft stands in the address
    expect(tokens).to_have_value("64")
    look_at(page, "new-evaluation")
    service.engine.is_full = True
    try:
        page.get_by_role("button", name="Create the evaluation").click()
        expect(page).to_have_url(re.compile(r"#/evaluations/evaluation-\w+$"))
        expect(page.get_by_role("heading", name="compare")).to_be_visible()
        made = api.post(f"/x/evaluations/{page.url.rpartition('/')[2]}/cancel").json()
    finally:
        service.engine.is_full = False
    request = made["request"]
    assert (made["model"], request["baseline"], made["num_items"]) == ("tiny", "small", 2)
    assert request["judge"].items() >= {"type": "regex", "pattern": "^Gladly"}.items()
    assert request["sampling"]["max_tokens"] == 64


@pytest.mark.parametrize("kind", OF_KIND)
def test_the_form_has_the_fields_of_each_kind(form: Page, kind: str) -> None:
    page = form
    page.get_by_label("kind", exact=True).select_option(kind)
    for name in set().union(*OF_KIND.values()) | OF_ALL_KINDS:
        has_it = name in OF_KIND[kind] | OF_ALL_KINDS
        expect(page.locator(f"[id='{name}']")).to_have_count(int(has_it))


def test_the_form_has_the_fields_of_each_judge(form: Page) -> None:
    page = form
    for judge, names in OF_JUDGE.items():
        page.get_by_label("type", exact=True).select_option(judge)
        for name in set().union(*OF_JUDGE.values()):
            expect(page.locator(f"[id='judge.{name}']")).to_have_count(int(name in names))


def test_a_job_leads_to_the_evaluation_of_its_policy(
    page: Page, service: Service, api: httpx.Client, file_id: str
) -> None:
    upload = {"files": {"file": ("held-out.jsonl", pairs(11))}, "data": {"purpose": "fine-tune"}}
    held_out = api.post("/files", **upload).json()["id"]
    job_id = submit(api, file_id, validation_file=held_out)
    wait_until_ended(api, job_id)
    sign_in(page)
    open_job(page, service.url, job_id)
    page.get_by_role("link", name="Evaluate the policy").click()
    policy = api.get(f"/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"]
    expect(page.locator("[id='model']")).to_have_value(policy)
    expect(page.get_by_label("File of prompts", exact=True)).to_have_value(held_out)

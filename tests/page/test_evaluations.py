"""The list of evaluations, and one: its results, and its items with both answers side by side."""

import json
from typing import Any

import httpx
import psycopg
import pytest
from playwright.sync_api import Page, expect

from tests.page.browsing import look_at, sign_in
from tests.page.conftest import Service

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


def test_an_evaluation_shows_its_results_and_both_answers(page: Page, service: Service, evaluation_id: str) -> None:
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

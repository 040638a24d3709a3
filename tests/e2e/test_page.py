"""Drives the web page of the whole service, with real parts, from a file to a policy that learned from votes."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from demo.rows import Shop
from tests.e2e.conftest import Service
from tests.e2e.test_service import shop_pairs
from tests.page.browsing import chromium, sign_in, tab

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long]

FIRST_ROW = next(Shop(num_things=8, num_held_out=8).pairs(1))  # of `shop_pairs`
ENDS_MS = 900_000  # a guard against hanging, on a machine that is busy


def submit(page: Page) -> str:
    """Submits the job of the form, waits for its view, and returns its id."""
    page.get_by_role("button", name="Submit the job").click()
    expect(page).to_have_url(re.compile(r"#/jobs/ftjob-\w+$"))
    return page.url.rpartition("/")[2]


def wait_until_succeeded(page: Page) -> None:
    expect(page.locator(".heading .status")).to_have_text("succeeded", timeout=ENDS_MS)


def vote(page: Page, number: int) -> None:
    """Asks both models, and improves the first answer."""
    page.get_by_label("Prompt", exact=True).fill(f"Where do I find saw {number}?")
    page.get_by_role("button", name="Ask both").click()
    page.get_by_role("button", name="Improve A").click(timeout=ENDS_MS)  # the first time, models are loaded
    page.get_by_label("Answer A, improved").fill(f"Gladly, in aisle {number}.")
    page.get_by_role("button", name="Store the improved text").click()
    expect(page.get_by_text("Your vote is stored")).to_be_visible()


def read_as_the_model_does(page: Page) -> None:
    """Looks at the rows of the new job's file as the model's tokenizer reads them, with the learned part marked."""
    draft = page.url
    page.get_by_role("link", name="Data", exact=True).click()
    page.get_by_role("link", name="pairs.jsonl").first.click()
    page.get_by_label("Model").select_option("tiny")
    expect(page.get_by_text("60 of 60 groups would be learned")).to_be_visible(timeout=ENDS_MS)
    row = page.get_by_role("article", name="Line 1 as the model reads it")
    prompt, chosen, rejected = FIRST_ROW
    for side, answer in enumerate((chosen, rejected)):
        words = row.locator(".words").nth(side)
        expect(words).to_contain_text(prompt)
        expect(words.locator("mark")).to_contain_text(answer)
        expect(words.locator("mark")).not_to_contain_text(prompt)
    page.goto(draft)


def score(page: Page, job_id: str) -> None:
    """Scores two answers with the policy of a job, which learned to prefer polite ones."""
    prompt, chosen, rejected = FIRST_ROW
    page.goto(page.url.partition("#")[0] + f"#/jobs/{job_id}")
    page.locator("a[href*='#/models/']").filter(has_text="ft:").first.click()
    page.get_by_role("link", name="Score answers").click()
    page.get_by_label("Prompt").fill(prompt)
    for number, answer in enumerate((rejected, chosen), 1):
        page.get_by_label(f"Answer {number}").fill(answer)
    page.get_by_role("button", name="Score", exact=True).click()
    best = page.get_by_role("row").filter(has_text="the best one")
    expect(best).to_contain_text(chosen, timeout=ENDS_MS)


def test_a_user_of_the_page_trains_a_policy_asks_it_and_trains_on_the_votes(service: Service, tmp_path: Path) -> None:
    """The first job survives a restart of the control plane, which the page follows."""
    good, bad = tmp_path / "pairs.jsonl", tmp_path / "bad.jsonl"
    good.write_bytes(shop_pairs(60))
    bad.write_bytes(shop_pairs(20) + b"\n" + json.dumps({"prompt": "Hi", "chosen": "Hello"}).encode())
    with chromium() as browser, tab(browser, service.url) as page:
        sign_in(page, service.key)
        page.get_by_role("link", name="New job").click()
        place = page.get_by_label("Or drop a new training file here")
        place.set_input_files(bad)
        expect(page.get_by_role("alert")).to_contain_text("Line 21")
        place.set_input_files(good)
        expect(page.get_by_text("60 rows, 60 pairs")).to_be_visible()
        page.get_by_label("n_epochs", exact=True).fill("50")
        page.get_by_label("batch_size", exact=True).fill("4")
        page.keyboard.press("Tab")
        expect(page.get_by_role("region", name="Plan")).to_contain_text("750")
        read_as_the_model_does(page)
        first = submit(page)
        expect(page.get_by_role("figure", name="Loss")).to_be_visible(timeout=ENDS_MS)
        service.kill()
        lost = page.get_by_text("The connection to the service is lost.")
        expect(lost).to_be_visible()
        service.start()
        expect(lost).to_have_count(0)
        wait_until_succeeded(page)
        expect(page.get_by_role("figure", name="Loss")).to_have_attribute("aria-label", re.compile("steps 1 to 750$"))
        page.get_by_role("link", name="Ask the policy").click()
        page.get_by_text("System prompt and sampling").click()
        page.get_by_label("Most tokens").fill("8")
        for number in range(10):
            vote(page, number)
        page.get_by_role("button", name="Make a training file: Pairs").click()
        expect(page.get_by_text("holds 10 votes")).to_be_visible()
        page.get_by_role("link", name="Train on it").click()
        expect(page.get_by_text("10 rows, 10 pairs")).to_be_visible()
        second = submit(page)
        wait_until_succeeded(page)
        page.get_by_role("link", name="Jobs", exact=True).click()
        for job_id in (first, second):
            page.get_by_role("checkbox", name=f"Compare {job_id}").check()
        page.get_by_role("link", name="Compare 2 jobs").click()
        expect(page.get_by_role("figure", name="Loss")).to_be_visible()
        score(page, first)

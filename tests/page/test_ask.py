"""Asking two models at once, voting without seeing their names, and a training file of the votes."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.browsing import look_at, sign_in
from tests.page.conftest import Service

pytestmark = pytest.mark.slow

PROMPT = "Where do I find a red saw?"
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(autouse=True)
def answers(service: Service) -> Iterator[None]:
    service.engine.answers = {"tiny": ["No ", "idea", "."], "polite": ["?Tools are in aisle four.", "Aisle ", "four."]}
    service.engine.without_template, service.engine.is_full = set(), False
    yield
    service.engine.pause_seconds = 0.02


def open_ask(page: Page, service: Service, query: str = "?a=tiny&b=polite") -> None:
    sign_in(page)
    page.goto(f"{service.url}/#/ask{query}")
    expect(page.get_by_role("heading", name="Ask two policies")).to_be_visible()


def put(page: Page, service: Service, prompt: str = PROMPT) -> None:
    before = len(service.engine.bodies)
    field = page.get_by_label("Prompt", exact=True)
    field.fill(prompt)
    field.press("Control+Enter")
    deadline = time.monotonic() + 300
    while len(service.engine.bodies) < before + 2:  # until then, the page may still show the answers before
        assert time.monotonic() < deadline, "the models were not asked"
        page.wait_for_timeout(20)
    expect(page.get_by_text("Both answers are there. Which")).to_be_visible()


def answer(page: Page, name: str) -> Any:
    return page.get_by_role("region", name=f"Answer {name}")


def newest(api: httpx.Client) -> dict[str, Any]:
    return dict(api.get("/x/feedback?limit=1").json()["data"][0])


def num_votes(api: httpx.Client, kind: str, form: str = "messages") -> int:
    counts = api.get("/x/feedback").json()["counts"]
    return sum(each["num_votes"] for each in counts if (each["kind"], each["form"]) == (kind, form))


def test_two_answers_are_written_side_by_side_and_judged_blindly(
    page: Page, service: Service, api: httpx.Client
) -> None:
    open_ask(page, service)
    expect(page.get_by_text("There are no votes yet.")).to_be_visible()
    look_at(page, "ask-empty")
    page.get_by_text("System prompt and sampling").click()
    page.get_by_label("System prompt", exact=True).fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Most tokens").fill("64")
    put(page, service)
    assert {body["model"] for body in service.engine.bodies[-2:]} == {"tiny", "polite"}
    wanted = {"temperature": 0.5, "max_tokens": 64, "stream": True}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    for body in service.engine.bodies[-2:]:
        assert body.items() >= (wanted | {"messages": messages}).items()
    for name in "AB":
        expect(answer(page, name)).to_contain_text(re.compile("Aisle four.|No idea."))
        expect(answer(page, name)).not_to_contain_text(re.compile("tiny|polite"))
    look_at(page, "ask-answers")
    good = "A" if "Aisle" in answer(page, "A").inner_text() else "B"
    page.get_by_role("button", name=f"{good} is better").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").filter(has_text="Your vote is stored")).to_be_focused()
    expect(answer(page, good)).to_contain_text("polite")
    expect(answer(page, "BA"["AB".index(good)])).to_contain_text("tiny")
    look_at(page, "ask-voted")
    row = newest(api)["row"]
    assert row["prompt"] == messages
    assert row["feedback"]["models"] == ["polite", "tiny"]
    thought = {"reasoning_content": "Tools are in aisle four."}
    assert row["chosen"] == [{"role": "assistant", "content": "Aisle four.", **thought}]
    assert row["rejected"] == [{"role": "assistant", "content": "No idea."}]
    page.get_by_role("button", name="Take the vote back").click()
    expect(page.get_by_text("The vote is taken back.")).to_be_visible()
    assert api.get("/x/feedback").json()["data"] == []


def test_the_answers_are_shuffled(page: Page, service: Service) -> None:
    open_ask(page, service)
    firsts = set()
    for _ in range(60):
        put(page, service)
        firsts.add(answer(page, "A").inner_text())
        if len(firsts) == 2:
            return
    raise AssertionError("sixty answers were in the same order")


def test_names_are_shown_at_once_and_in_order_if_the_reader_wants(page: Page, service: Service) -> None:
    open_ask(page, service)
    page.get_by_label("Hide until the vote").uncheck()
    assert page.url.endswith("#/ask?a=tiny&b=polite&names=shown")
    for _ in range(3):
        put(page, service)
        expect(answer(page, "A").get_by_role("heading")).to_have_text("Answer A tiny")
        expect(answer(page, "B").get_by_role("heading")).to_have_text("Answer B polite")


def test_ties_bad_answers_and_improved_ones_are_votes_and_become_a_training_file(
    page: Page, service: Service, api: httpx.Client
) -> None:
    open_ask(page, service, "?a=tiny&b=polite&names=shown")
    put(page, service)
    page.get_by_role("button", name="Tie", exact=True).click()
    expect(page.get_by_text("Your vote is stored: tie. A was tiny, B was polite.")).to_be_visible()
    assert newest(api)["row"]["scores"] == [1, 1]
    put(page, service)
    page.get_by_role("button", name="Both are bad").click()
    expect(page.get_by_text("Your vote is stored: both bad.")).to_be_visible()
    assert num_votes(api, "unpaired") == 2
    assert newest(api)["row"]["label"] is False
    for number in range(10):
        put(page, service)
        page.get_by_role("button", name="Improve A").click()
        improved = page.get_by_label("Answer A, improved")
        expect(improved).to_be_focused()
        expect(improved).to_have_value("No idea.")
        improved.fill(f"Aisle {number}.")
        page.get_by_role("button", name="Store the improved text").click()
        expect(page.get_by_text("Your vote is stored: your text is the better answer.")).to_be_visible()
    row = newest(api)["row"]
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("Aisle 9.", "No idea.")
    assert row["feedback"]["models"] == [None, "tiny"]
    expect(page.get_by_text("10 votes", exact=True)).to_be_visible()
    page.get_by_role("button", name="Make a training file: Pairs").click()
    expect(page.get_by_text("holds 10 votes")).to_be_visible()
    look_at(page, "ask-file")
    file_id = page.locator(".made code").inner_text()
    job = {"model": "tiny", "training_file": file_id, "method": {"type": "dpo"}}
    assert api.post("/x/jobs/validate", json=job).status_code == 200
    lines = api.get(f"/files/{file_id}/content").text.splitlines()
    assert [json.loads(line)["chosen"][0]["content"] for line in lines] == [f"Aisle {n}." for n in range(10)]
    page.get_by_role("link", name="Train on it").click()
    assert page.url.endswith(f"#/jobs/new?training_file={file_id}")
    expect(page.get_by_role("heading", name="New job")).to_be_visible()


def test_a_model_without_a_chat_template_continues_the_plain_text(
    page: Page, service: Service, api: httpx.Client
) -> None:
    service.engine.without_template = {"tiny", "polite"}
    service.engine.answers["polite"] = ["Aisle four."]
    open_ask(page, service, "?a=tiny&b=polite&names=shown")
    put(page, service)
    asked = [body["prompt"] for body in service.engine.bodies[-4:] if "prompt" in body]  # the others were chats
    assert asked == [PROMPT] * 2
    page.get_by_role("button", name="B is better").click()
    expect(page.get_by_text("Your vote is stored")).to_be_visible()
    row = newest(api)["row"]
    assert (row["prompt"], row["chosen"], row["rejected"]) == (PROMPT, "Aisle four.", "No idea.")


def test_a_long_answer_is_stopped(page: Page, service: Service) -> None:
    service.engine.answers["tiny"] = ["and "] * 10_000
    open_ask(page, service)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_text(re.compile("and and and"))).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("You have stopped this answer.")).to_be_visible()
    expect(page.get_by_text("An answer is missing")).to_be_visible()
    expect(page.get_by_role("button", name="A is better")).to_have_count(0)


def test_what_fails_is_said_in_words(page: Page, service: Service) -> None:
    service.engine.is_full = True
    open_ask(page, service, "?a=tiny&b=polite&names=shown")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_text("The model 'tiny' cannot answer now: its queue is full.")).to_be_visible()
    look_at(page, "ask-waiting")
    service.engine.is_full = False
    expect(page.get_by_text("Both answers are there. Which")).to_be_visible()
    service.plane.kill()
    page.get_by_role("button", name="B is better").click()
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer.")
    service.plane.start()
    service.plane.wait()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("Your vote is stored")).to_be_visible()


def test_hostile_answers_are_text_and_nothing_else(page: Page, service: Service, api: httpx.Client) -> None:
    service.engine.answers["tiny"] = [MARKUP[:9], MARKUP[9:], " \u202egnp.exe ", "w" * 500]
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    open_ask(page, service)
    put(page, service, MARKUP)
    expect(page.get_by_text(MARKUP).last).to_be_visible()
    assert page.locator("main img").count() == 0
    look_at(page, "ask-hostile")
    page.get_by_role("button", name="Tie", exact=True).click()
    expect(page.get_by_text("Your vote is stored")).to_be_visible()
    assert newest(api)["row"]["prompt"][-1]["content"] == MARKUP


def test_a_model_of_the_address_that_is_gone_is_named(page: Page, service: Service) -> None:
    open_ask(page, service, "?a=ft:tiny:gone&b=polite")
    expect(page.get_by_label("First model")).to_have_value("ft:tiny:gone")
    expect(page.get_by_label("First model")).to_have_accessible_description(re.compile("'ft:tiny:gone' does not exist"))
    expect(page.get_by_label("Second model")).to_have_value("polite")
    look_at(page, "ask-gone")
    page.get_by_label("First model").select_option("tiny")
    expect(page.get_by_role("alert")).to_have_count(0)

"""Files of training data: their list, what their checks found, their rows side by side, and what a model sees."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.browsing import look_at, sign_in
from tests.page.conftest import Service
from tests.services.control_plane.conftest import pairs

pytestmark = pytest.mark.slow

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
LENIENT = {"x_raydpo[invalid_rows]": "drop", "x_raydpo[max_invalid_share]": "0.5"}


def upload(api: httpx.Client, rows: list[dict[str, Any]], name: str = "rows.jsonl", **options: str) -> str:
    content = "\n".join(json.dumps(row) for row in rows).encode()
    answer = api.post("/files", files={"file": (name, content)}, data={"purpose": "fine-tune"} | options)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def texts(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}, surely.", "rejected": f"It is {i + 1}."}
        for i in range(count)
    ]


def open_file(page: Page, service: Service, file_id: str, query: str = "") -> None:
    sign_in(page)
    page.goto(f"{service.url}/#/data/{file_id}{query}")
    expect(page.get_by_role("region", name="Rows").get_by_role("article").first).to_be_visible()


def test_a_file_is_dropped_read_by_page_and_deleted_by_keyboard(page: Page, api: httpx.Client, tmp_path: Path) -> None:
    sign_in(page)
    page.get_by_role("navigation", name="Views").get_by_role("link", name="Data").click()
    expect(page.get_by_text("This project has no files yet.")).to_be_visible()
    file = tmp_path / "answers.jsonl"
    file.write_bytes(pairs(25))
    page.get_by_label("Drop a training file here").set_input_files(file)
    expect(page.get_by_role("heading", name="answers.jsonl")).to_be_visible()
    rows = page.get_by_role("region", name="Rows").get_by_role("article")
    expect(rows).to_have_count(10)
    for _ in range(2):
        page.get_by_role("link", name="Further rows").focus()
        page.keyboard.press("Enter")
    expect(rows).to_have_count(5)
    expect(rows.last).to_have_accessible_name("Line 25")
    page.get_by_label("From line").fill("24")
    page.keyboard.press("Enter")
    expect(rows).to_have_count(2)
    assert page.url.endswith("?from=24")
    page.go_back()
    expect(rows).to_have_count(5)

    page.get_by_role("link", name="Data").click()
    expect(page.get_by_role("row", name="answers.jsonl")).to_contain_text("OpenAI preference")
    look_at(page, "data")
    page.get_by_role("button", name="Delete").focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog").get_by_role("button", name="Delete").press("Enter")
    expect(page.get_by_text("This project has no files yet.")).to_be_visible()


def test_chosen_and_rejected_stand_side_by_side_with_their_difference(
    page: Page, service: Service, api: httpx.Client
) -> None:
    rows = texts(12)
    rows[3] = rows[2] | {"chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    open_file(page, service, upload(api, rows))
    findings = page.locator(".findings")
    expect(findings).to_contain_text("12 rows, 12 pairs, in the format prompt/chosen/rejected texts.")
    expect(findings).to_contain_text("1 row preferring what an earlier row rejects. Line 4")
    row = page.get_by_role("article", name="Line 1", exact=True)
    assert row.locator(".best mark").all_inner_texts() == ["0, surely"]
    assert row.locator(".worst mark").all_inner_texts() == ["1"]
    look_at(page, "file")
    findings.get_by_role("link", name="4", exact=True).first.click()
    expect(page.get_by_role("region", name="Rows").get_by_role("article").first).to_have_accessible_name("Line 4")


def test_messages_rankings_and_tools_are_shown(page: Page, service: Service, api: httpx.Client) -> None:
    ask = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answers = [[{"role": "assistant", "content": words}] for words in ("Hello.", "Hi there.", "What?")]
    rows = [{"prompt": ask, "completions": answers, "scores": [3, 2.5, 1], "weight": 0.5}] * 10
    open_file(page, service, upload(api, rows))
    row = page.get_by_role("article", name="Line 1", exact=True)
    expect(row).to_contain_text("system:\nBe brief.\n\nuser:\nHi", use_inner_text=True)
    expect(row.get_by_role("heading", level=4)).to_have_text(
        ["Prompt", "1 of 3, rated 3", "2 of 3, rated 2.5", "3 of 3, rated 1"]
    )
    expect(row).to_contain_text("weight 0.5")


def test_what_a_model_sees_is_checked_on_request(page: Page, service: Service, api: httpx.Client) -> None:
    open_file(page, service, upload(api, texts(12)))
    page.get_by_label("Model").select_option("small")
    expect(page.get_by_text("11 of 12 groups would be learned, with at most 32 tokens each.")).to_be_visible()
    assert "model=small" in page.url
    expect(page.get_by_text("left out: too long").first).to_be_visible()
    expect(page.locator("mark.learned").first).to_have_text("It is 1.</s>")
    table = page.get_by_role("table", name="Rows by their tokens")
    expect(table.get_by_role("row", name="9 to 16 6 6 6")).to_be_visible()
    look_at(page, "file-of-a-model")


def test_hostile_rows_are_text_and_nothing_else(page: Page, service: Service, api: httpx.Client) -> None:
    hostile = {"prompt": MARKUP, "chosen": "safe \u202egnp.exe\u202c \u0007 👩\u200d🚀", "rejected": "w" * 100_000}
    half = {"prompt": "half a character", "chosen": "\ud800", "rejected": "x"}
    right_to_left = {"prompt": "שלום? <b>", "chosen": "مرحبا", "rejected": "</div></script>"}
    rows = [hostile, half, right_to_left, *texts(12)]
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    open_file(page, service, upload(api, rows, f"{MARKUP.replace('/', '')}.jsonl", **LENIENT))
    row = page.get_by_role("article", name="Line 1", exact=True)
    expect(row).to_contain_text(MARKUP)
    expect(row).to_contain_text("safe ⟨U+202E⟩gnp.exe⟨U+202C⟩ ⟨U+0007⟩ 👩\u200d🚀")
    expect(page.get_by_role("article", name="Line 2", exact=True)).to_contain_text("Left out")
    expect(page.get_by_role("article", name="Line 3", exact=True)).to_contain_text("</div></script>")
    assert page.locator("img").count() == 0
    look_at(page, "file-hostile")
    row.get_by_role("button", name=re.compile("Show all 100,000 characters")).click()
    expect(row.locator(".worst .words")).to_have_text("w" * 100_000)
    page.get_by_role("link", name="Data").click()
    expect(page.get_by_role("row", name="onerror").first).to_be_visible()
    look_at(page, "data-hostile")


def test_what_is_not_there_is_said_in_words(page: Page, service: Service, api: httpx.Client) -> None:
    file_id = upload(api, texts(12))
    sign_in(page)
    page.goto(f"{service.url}/#/data/{file_id}?from=100&model=none")
    expect(page.get_by_text("The file has no rows from line 100 on.")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("none")
    page.goto(f"{service.url}/#/data/file-none")
    expect(page.get_by_role("alert")).to_contain_text("file-none")

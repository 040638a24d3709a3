"""Making a job from a file: upload, options, plan, refusals, and the same job again."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.browsing import look_at, open_job, sign_in, submit
from tests.page.conftest import Service
from tests.services.control_plane.conftest import pairs

pytestmark = pytest.mark.slow

NO_PAIR = json.dumps({"prompt": "Hi", "chosen": "Hello"}).encode()


@pytest.fixture
def new_job(page: Page, service: Service) -> Page:
    sign_in(page)
    page.get_by_role("link", name="New job").click()
    expect(page.get_by_role("heading", name="New job")).to_be_visible()
    return page


def drop(page: Page, place: str, name: str, content: bytes) -> None:
    """Drops a file onto the place with this label."""
    script = "([name, text]) => { const all = new DataTransfer(); all.items.add(new File([text], name)); return all; }"
    dropped = page.evaluate_handle(script, [name, content.decode()])
    page.locator("label.drop", has_text=place).dispatch_event("drop", {"dataTransfer": dropped})


def request_of(page: Page, api: httpx.Client) -> dict[str, Any]:
    """Returns the request of the job whose page is open."""
    expect(page).to_have_url(re.compile(r"#/jobs/ftjob-\w+$"))
    job = api.get(f"/fine_tuning/jobs/{page.url.rpartition('/')[2]}").json()
    api.post(f"/fine_tuning/jobs/{job['id']}/cancel")
    return dict(job["x_raydpo"]["request"])


def test_a_job_is_made_of_a_file_with_bad_rows(new_job: Page, api: httpx.Client, tmp_path: Path) -> None:
    page = new_job
    file = tmp_path / "with <b>bad rows.jsonl"
    file.write_bytes(pairs(4) + NO_PAIR + b"\n" + pairs(20))
    page.get_by_label("Or drop a new training file here").set_input_files(file)
    expect(page.get_by_role("alert")).to_contain_text("Line 5")
    page.get_by_label("Start from").select_option("small")  # the reader goes on meanwhile
    look_at(page, "new-job-refused-file")
    page.get_by_role("button", name="Send it again, without the rows that cannot be used").click()
    findings = page.locator(".findings").first
    expect(findings).to_contain_text("25 rows, 24 pairs")
    expect(findings.get_by_role("link", name="5", exact=True)).to_be_visible()
    expect(findings).to_contain_text("4 rows repeating an earlier row")
    drop(page, "new validation file", "held out.jsonl", pairs(11))
    expect(page.locator(".findings").nth(1)).to_contain_text("11 rows, 11 pairs")

    plan = page.get_by_role("region", name="Plan")
    expect(plan).to_contain_text("The job fits")
    look_at(page, "new-job-plan")
    beta = page.get_by_label("beta")
    expect(beta).to_have_attribute("placeholder", "0.1")
    beta.fill("5")
    page.keyboard.press("Tab")
    expect(plan).to_contain_text("The service would refuse this job")
    expect(page.locator(".field", has=beta)).to_contain_text("beta is 5.0; it must be greater than 0 and at most 2.")
    expect(beta).to_have_attribute("aria-invalid", "true")
    look_at(page, "new-job")
    beta.fill("0.2")
    page.get_by_label("adapter", exact=True).select_option("none")
    page.get_by_label("n_epochs").fill("3")
    page.keyboard.press("Enter")  # submits what was just typed as well
    request = request_of(page, api)
    assert request["method"]["dpo"]["hyperparameters"]["beta"] == 0.2
    assert request["method"]["dpo"]["hyperparameters"]["n_epochs"] == 3
    assert request["x_raydpo"]["adapter"] == "none"
    assert request["validation_file"].startswith("file-")


def test_enter_submits_the_job_also_while_a_file_is_refused(new_job: Page, api: httpx.Client, file_id: str) -> None:
    page = new_job
    page.get_by_label("Training file", exact=True).select_option(file_id)
    drop(page, "new validation file", "held out.jsonl", pairs(11) + NO_PAIR + b"\n")
    expect(page.get_by_role("button", name="Send it again")).to_be_visible()
    page.get_by_label("Name").fill("entered")
    page.keyboard.press("Enter")
    assert request_of(page, api)["suffix"] == "entered"


def test_every_option_of_every_method_is_explained(new_job: Page, api: httpx.Client) -> None:
    page = new_job
    for method in api.get("/x/methods").json()["data"]:
        page.get_by_label("Method").select_option(method["id"])
        for name, option in method["hyperparameters"].items():
            field = page.locator(".field", has=page.get_by_label(name, exact=True))
            expect(field).to_contain_text(option["description"].replace("`", ""))
    page.get_by_text("More options").click()
    page.get_by_text("Options of the adapter").click()
    for option in api.get("/x/options").json()["data"]:
        field = page.locator(f"[id='x_raydpo.{option['id']}']")
        expect(field).to_be_visible()
        expect(field).to_have_accessible_name(option["id"])
        expect(field).to_have_accessible_description(re.compile(re.escape(option["description"].replace("`", ""))))
    look_at(page, "new-job-options")


def test_the_same_job_again_with_changes(page: Page, service: Service, api: httpx.Client, file_id: str) -> None:
    options = {"adapter": {"type": "lora", "r": 8}, "max_length": 512, "schedule": "cosine", "validation_share": 0.2}
    job_id = submit(api, file_id, suffix="1e3", metadata={"team": "a"}, seed=7, x_raydpo=options)
    api.post(f"/fine_tuning/jobs/{job_id}/cancel")
    before = api.get(f"/fine_tuning/jobs/{job_id}").json()["x_raydpo"]["request"]
    sign_in(page)
    open_job(page, service.url, job_id)
    page.get_by_role("link", name="Again, with changes").click()
    expect(page.get_by_label("beta")).to_have_value("0.2")
    page.get_by_label("beta").fill("0.3")
    page.keyboard.press("Tab")
    page.reload()  # the draft stands in the address
    expect(page.get_by_label("beta")).to_have_value("0.3")
    expect(page.get_by_label("schedule")).to_be_visible()
    page.get_by_role("button", name="Submit the job").click()
    after = request_of(page, api)
    assert after["method"]["dpo"]["hyperparameters"].pop("beta") == 0.3
    before["method"]["dpo"]["hyperparameters"].pop("beta")
    assert after == before


def test_a_refusal_stands_beside_its_field(new_job: Page, api: httpx.Client, file_id: str) -> None:
    page = new_job
    page.get_by_role("button", name="Submit the job").click()
    expect(page.get_by_role("alert")).to_contain_text("training_file")
    expect(page.get_by_label("Training file", exact=True)).to_be_focused()
    page.get_by_label("Training file", exact=True).select_option(file_id)
    page.get_by_label("Name").fill("not allowed!")
    page.get_by_role("button", name="Submit the job").click()
    expect(page.locator(".field", has=page.get_by_label("Name"))).to_contain_text("suffix")
    page.get_by_label("Name").fill("")
    page.get_by_label("max_length").fill("1")
    page.get_by_role("button", name="Submit the job").click()
    expect(page.locator(".field", has=page.get_by_label("max_length"))).to_contain_text("from 2 to 1048576")


def test_a_hostile_address_makes_no_other_request(page: Page, service: Service, file_id: str) -> None:
    sign_in(page)
    markup = "<img src=x onerror=alert(1)>"
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    page.goto(
        f"{service.url}/#/jobs/new?__proto__.polluted=1&method.__proto__.polluted=1&suffix={markup}&model={markup}"
    )
    expect(page.get_by_label("Name")).to_have_value(markup)
    assert page.evaluate("({}).polluted") is None
    assert page.locator("img").count() == 0

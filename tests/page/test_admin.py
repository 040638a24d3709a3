"""Keys, projects, usage and the audit log, as an admin sees them."""

import json
import re
from collections.abc import Iterator

import httpx
import psycopg
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.page.browsing import look_at, sign_in
from tests.page.conftest import Service
from tests.services.control_plane.conftest import api_of, new_key, new_project
from tests.services.receiver import Behaviour, Receiver
from tests.services.web import running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with running(Receiver()) as receiver:
        yield receiver


@pytest.fixture(scope="module")
def more_settings(receiver: Receiver) -> dict[str, str]:
    return {"RAYDPO_WEBHOOK_URLS": json.dumps(["https://", receiver.url])}


@pytest.fixture(scope="module")
def project(api: httpx.Client) -> str:
    return new_project(api, "research <b>", max_running_jobs=2)


@pytest.fixture(scope="module", autouse=True)
def used(api: httpx.Client, project: str, database_url: str) -> str:
    """A key that asked models on two days."""
    key = new_key(api, name="asks", project_id=project)["id"]
    with psycopg.connect(database_url) as rows:
        for day, model, number in (("2026-01-05", "tiny", 3), ("2026-01-05", "polite", 4), ("2026-01-06", "tiny", 5)):
            values = (project, key, model, day, number)
            rows.execute("INSERT INTO usage VALUES (%s, %s, %s, %s, %s, 1000, 20, 1.25)", values)
    return key


def open_part(page: Page, name: str) -> None:
    sign_in(page)
    page.get_by_role("link", name="Admin").click()
    page.get_by_role("navigation", name="Parts").get_by_role("link", name=name).click()
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()


def row(page: Page, name: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name))


def test_a_key_is_made_shown_once_copied_used_and_revoked(page: Page, service: Service, project: str) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_part(page, "Keys")
    page.get_by_label("Name", exact=True).fill("nightly")
    page.get_by_role("combobox", name="Project").select_option("research <b>")
    page.get_by_role("checkbox", name=re.compile("^inference")).uncheck()
    page.get_by_label("Days until it expires").fill("30")
    page.get_by_label("Requests a minute").fill("600")
    page.keyboard.press("Enter")
    secret = page.get_by_label("This is the only time that it is shown.")
    expect(secret).to_be_focused()
    value = secret.input_value()
    assert value.startswith("rd-")
    page.get_by_role("button", name="Copy").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("The key is copied.")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == value
    made = row(page, "nightly")
    expect(made).to_contain_text("read, write")
    expect(made).to_contain_text("at most 600 requests a minute")
    expect(made).to_contain_text("works until")
    expect(made).to_contain_text("research <b>")
    look_at(page, "keys")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_text(value)).to_have_count(0)
    assert value not in page.content()
    with api_of(service.url, value) as theirs:
        assert theirs.get("/files").status_code == 200
        made.get_by_role("button", name="Revoke").click()
        dialog = page.get_by_role("dialog", name="Revoke the key nightly?")
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        made.get_by_role("button", name="Revoke").click()
        dialog.get_by_role("button", name="Revoke").click()
        expect(made).to_contain_text("revoked")
        page.wait_for_timeout(1100)
        assert theirs.get("/files").status_code == 401


def test_a_key_without_a_scope_is_refused_in_words(page: Page) -> None:
    open_part(page, "Keys")
    page.get_by_label("Name", exact=True).fill("no scope")
    for scope in ("read", "write", "inference"):
        page.get_by_role("checkbox", name=re.compile(f"^{scope}")).uncheck()
    page.get_by_role("button", name="Make the key").click()
    expect(page.get_by_role("alert")).to_contain_text("scopes")


def test_a_project_is_made_limited_and_archived(page: Page, api: httpx.Client) -> None:
    open_part(page, "Projects")
    expect(row(page, "research <b>")).to_contain_text("Running jobs: 2")
    look_at(page, "projects")
    page.get_by_label("Name", exact=True).fill("by hand")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="by hand")).to_be_visible()
    page.get_by_label("Bytes of files and votes").fill("5000000")
    page.get_by_label("Accelerator hours").fill("1.5")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The changes are stored.")).to_be_visible()
    expect(page.get_by_text("0 bytes of 5.00 MB")).to_be_visible()
    look_at(page, "project")
    project_id = page.url.rpartition("/")[2]
    told = api.get(f"/x/projects/{project_id}").json()
    assert (told["max_bytes"], told["max_accelerator_hours"], told["max_queued_jobs"]) == (5_000_000, 1.5, None)
    page.get_by_role("button", name="Archive the project").click()
    page.get_by_role("dialog").get_by_role("button", name="Archive the project").click()
    expect(page.get_by_text(re.compile("^archived "))).to_be_visible()
    page.get_by_role("button", name="Delete the project").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete the project").click()
    expect(row(page, "research <b>")).to_be_visible()
    expect(page.get_by_text("by hand")).to_have_count(0)


def test_a_webhook_is_made_tested_and_deleted(
    page: Page, service: Service, api: httpx.Client, receiver: Receiver
) -> None:
    receiver.paths["/chat"] = Behaviour(statuses=[202])
    open_part(page, "Webhooks")
    expect(page.get_by_text("There are no webhooks.")).to_be_visible()
    page.get_by_label("Name", exact=True).fill("chat <b>")
    page.get_by_label("URL").fill("http://hooks.example.com/")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("webhook_urls")
    page.get_by_label("URL").fill(f"{receiver.url}/chat")
    page.get_by_role("checkbox", name="fine_tuning.job.cancelled").uncheck()
    page.get_by_role("button", name="Make the webhook").click()
    secret = page.get_by_label("This is the only time that it is shown.")
    expect(secret).to_be_focused()
    value = secret.input_value()
    assert value.startswith("whsec_")
    made = row(page, "chat <b>")
    expect(made).to_contain_text("fine_tuning.job.succeeded")
    expect(made).not_to_contain_text("cancelled")
    made.get_by_role("button", name="Test").click()
    expect(made).to_contain_text("It answered with status 202.")
    sent = json.loads(receiver.at("/chat")[0].body)
    assert (sent["type"], sent["data"]["id"]) == ("eval.run.canceled", "eval-test")
    look_at(page, "webhooks")
    page.get_by_role("button", name="Done").click()
    assert value not in page.content()
    page.reload()
    expect(made).to_be_visible()
    assert value not in page.content()
    made.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog", name="Delete the webhook chat <b>?").get_by_role("button", name="Delete").click()
    expect(page.get_by_text("There are no webhooks.")).to_be_visible()
    assert api.get("/webhook_endpoints").json()["data"] == []


def test_usage_is_summed_by_day_model_and_key(page: Page, used: str) -> None:
    open_part(page, "Usage")
    page.get_by_label("To", exact=True).fill("2026-01-31")
    expect(row(page, "2026-01-05")).to_have_text(re.compile("2026-01-05 *7 *2,000 *40 *2.5"))
    page.get_by_role("combobox", name="By").select_option("model")
    expect(row(page, "tiny")).to_have_text(re.compile("tiny *8 *2,000 *40 *2.5"))
    page.get_by_label("From", exact=True).fill("2026-01-06")
    expect(row(page, "tiny")).to_have_text(re.compile("tiny *5 *1,000 *20 *1.25"))
    page.get_by_role("combobox", name="By").select_option("key")
    expect(row(page, "asks")).to_contain_text(used)
    look_at(page, "usage")
    assert page.url.endswith("#/admin/usage?to=2026-01-31&by=key&from=2026-01-06")
    page.get_by_role("combobox", name="Project").select_option("default")
    expect(page.get_by_text("Nobody asked a model in this time.")).to_be_visible()
    look_at(page, "usage-empty")


def test_the_audit_log_tells_changes_and_refusals(
    page: Page, service: Service, api: httpx.Client, project: str
) -> None:
    key = new_key(api, name="reads only", project_id=project, scopes=["read"])
    with api_of(service.url, key["value"]) as theirs:
        theirs.get("/x/keys")
    open_part(page, "Audit")
    made = page.get_by_role("row").filter(has_text=key["id"]).filter(has_text="POST /v1/x/keys")
    expect(made).to_contain_text("the key of the settings")
    expect(made).to_contain_text("done")
    page.get_by_role("combobox", name="Project").select_option("research <b>")
    expect(page.get_by_role("row").filter(has_text="reads only")).to_contain_text("refused with 403 missing_scope")
    look_at(page, "audit")


def test_a_key_that_is_no_admin_s_is_told_so(page: Page, service: Service, api: httpx.Client) -> None:
    sign_in(page, new_key(api, scopes=["read"])["value"])
    for part in ("keys", "projects", "usage", "audit"):
        page.goto(f"{service.url}/#/admin/{part}")
        expect(page.get_by_role("alert").first).to_contain_text("needs a key with the scope 'admin'")
    look_at(page, "audit-refused")

"""Signing in, the list of jobs, and a job that is followed while it runs."""

import json
import math
import re

import httpx
import psycopg
import pytest
from playwright.sync_api import Page, Route, expect

from services import storage
from tests.page.browsing import look_at, open_job, sign_in, submit, wait_until_ended
from tests.page.conftest import Service
from tests.services.control_plane.conftest import API_KEY
from tests.services.control_plane.steps import counted, insert_steps, pack_all

pytestmark = pytest.mark.slow


def messages(api: httpx.Client, job_id: str) -> list[str]:
    """Newest first."""
    listed = api.get(f"/fine_tuning/jobs/{job_id}/events", params={"type": "message", "limit": 100}).json()
    return [event["message"] for event in listed["data"]]


def test_a_wrong_key_is_refused_and_a_right_one_stays_in_this_tab_only(page: Page, service: Service) -> None:
    look_at(page, "sign-in")
    sign_in(page, "rd-wrong")
    expect(page.get_by_role("alert")).to_contain_text("does not know this key")
    sign_in(page)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    assert API_KEY not in page.url
    assert page.evaluate("localStorage.length") == 0
    page.reload()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    other = page.context.new_page()
    other.goto(f"{service.url}/")
    expect(other.get_by_label("API key")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    page.reload()
    expect(page.get_by_label("API key")).to_be_visible()
    assert "GET /v1/fine_tuning/jobs 200" in service.logged()
    assert API_KEY not in service.logged()


def test_a_key_that_is_kept_on_request_opens_another_tab(page: Page, service: Service) -> None:
    page.get_by_label("Keep the key in this browser").check()
    sign_in(page)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    other = page.context.new_page()
    other.goto(f"{service.url}/")
    expect(other.get_by_role("heading", name="Jobs")).to_be_visible()


def test_a_running_job_is_followed_through_a_restart_of_the_service(
    page: Page, service: Service, api: httpx.Client, file_id: str
) -> None:
    """Nothing is lost and nothing comes twice, though the connection breaks off twice and the page is loaded anew."""
    job_id = submit(api, file_id, suffix="followed", x_raydpo={"validation_share": 0.25})
    sign_in(page)
    open_job(page, service.url, job_id)
    loss = page.get_by_role("figure", name="Loss")
    expect(loss).to_be_visible()
    service.plane.kill()
    expect(page.get_by_text("The connection to the service is lost.")).to_be_visible()
    service.plane.start()
    service.plane.wait()
    expect(page.get_by_text("The connection to the service is lost.")).to_have_count(0)
    page.reload()
    expect(loss).to_be_visible()
    wait_until_ended(api, job_id)
    expect(page.locator(".heading .status")).to_have_text("succeeded")
    steps = api.get(f"/x/jobs/{job_id}/metrics").json()["steps"]
    assert steps == list(range(1, 81))
    expect(loss).to_have_attribute("aria-label", re.compile("80 points, steps 1 to 80$"))
    if page.get_by_role("button", name="Older events").is_visible():
        page.get_by_role("button", name="Older events").click()
    expect(page.locator(".events li > span")).to_have_text(
        [re.compile(f"^((Warning|Error): )?{re.escape(message)}$") for message in messages(api, job_id)]
    )
    expect(page.get_by_text("The chosen answers have become less likely")).to_be_visible()
    policy = api.get(f"/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"]
    expect(page.get_by_role("link", name=policy, exact=True)).to_have_attribute("href", re.compile("^#/models/"))
    look_at(page, "job")
    page.get_by_role("link", name="Ask the policy").click()
    expect(page.get_by_label("First model")).to_have_value(policy)


def test_a_job_leads_to_its_models_and_to_its_evaluations(
    page: Page, service: Service, api: httpx.Client, file_id: str, database_url: str
) -> None:
    """No engine here answers the evaluation, so what it finds is written into the database."""
    asked = {"better_answers": {"kind": "compare", "judge": {"type": "length"}, "file": file_id}}
    service.engine.is_full = True
    try:
        job_id = submit(api, file_id, x_raydpo={"evaluations": asked})
        wait_until_ended(api, job_id)
        sign_in(page)
        open_job(page, service.url, job_id)
        evaluations = page.locator("section", has=page.get_by_role("heading", name="Evaluations"))
        expect(evaluations.get_by_text("running")).to_be_visible()
        (told,) = api.get(f"/fine_tuning/jobs/{job_id}").json()["x_raydpo"]["evaluations"]
        results = json.dumps({"win_rate": {"value": 0.75, "low": 0.5, "high": 0.875}})
        with psycopg.connect(database_url, autocommit=True) as rows:
            ends = "state = 'succeeded', finished_at = now(), results = %s, waits_for = NULL"
            rows.execute(f"UPDATE evaluations SET {ends} WHERE id = %s", (results, told["id"]))
        expect(evaluations).to_contain_text("win rate 75.0 % (50.0 % to 87.5 %)")
    finally:
        service.engine.is_full = False
    expect(page.get_by_role("figure", name="Use of the hardware: first worker from 3")).to_be_visible()
    look_at(page, "job-evaluations")
    evaluations.get_by_role("link", name="better_answers").click()
    expect(page).to_have_url(re.compile(f"#/evaluations/{told['id']}$"))
    open_job(page, service.url, job_id)
    checkpoint = api.get(f"/fine_tuning/jobs/{job_id}/checkpoints").json()["data"][0]["fine_tuned_model_checkpoint"]
    page.get_by_role("link", name=checkpoint, exact=True).click()
    expect(page.get_by_role("heading", name=checkpoint, exact=True)).to_be_visible()


def test_a_reward_model_is_not_asked(page: Page, service: Service, api: httpx.Client, file_id: str) -> None:
    job_id = submit(api, file_id, method={"type": "reward_bradley_terry"})
    wait_until_ended(api, job_id)
    sign_in(page)
    open_job(page, service.url, job_id)
    expect(page.get_by_role("link", name="Again, with changes")).to_be_visible()
    expect(page.get_by_role("link", name="Ask the policy")).to_have_count(0)


def test_a_fall_that_is_less_than_what_batches_differ_in_is_no_warning(
    page: Page, service: Service, api: httpx.Client
) -> None:
    """Answers of another batch are longer or shorter, and so less or more likely."""
    job_id = api.get("/fine_tuning/jobs?status=succeeded").json()["data"][0]["id"]

    def unlike(route: Route) -> None:
        answer = route.fetch()
        told = answer.json()
        chosen = told["metrics"]["logps_chosen"]
        chosen["mean"] = [value + 12 * math.sin(step * step) for step, value in enumerate(chosen["mean"])]
        route.fulfill(response=answer, json=told)

    sign_in(page)
    warning = page.get_by_text("The chosen answers have become less likely")
    open_job(page, service.url, job_id)
    expect(warning).to_be_visible()
    page.route(f"**/v1/x/jobs/{job_id}/metrics?*", unlike)
    page.reload()
    expect(page.get_by_role("figure", name="Log-probabilities")).to_be_visible()
    expect(warning).to_have_count(0)


def test_a_range_of_steps_stands_in_the_address(page: Page, service: Service, api: httpx.Client) -> None:
    job_id = api.get("/fine_tuning/jobs?status=succeeded").json()["data"][0]["id"]
    sign_in(page)
    open_job(page, service.url, job_id, "?from=11&to=30")
    loss = page.get_by_role("figure", name="Loss")
    expect(loss).to_have_attribute("aria-label", re.compile("20 points, steps 11 to 30$"))
    page.get_by_label("to", exact=True).fill("20")
    page.keyboard.press("Enter")
    expect(loss).to_have_attribute("aria-label", re.compile("10 points, steps 11 to 20$"))
    assert page.url.endswith("?from=11&to=20")
    page.go_back()
    expect(loss).to_have_attribute("aria-label", re.compile("20 points, steps 11 to 30$"))
    page.get_by_role("button", name="All steps").click()
    expect(loss).to_have_attribute("aria-label", re.compile("80 points, steps 1 to 80$"))


def test_the_place_in_a_log_stands_in_the_address(page: Page, service: Service, api: httpx.Client) -> None:
    job_id = api.get("/fine_tuning/jobs?status=succeeded").json()["data"][0]["id"]
    folder = storage.join(service.storage_url, "runs", job_id, "logs", "1", "driver")
    log = "".join(f"line {number}\n" for number in range(2500))
    storage.write_bytes(storage.join(folder, "000000000000.log"), log.encode())
    sign_in(page)
    open_job(page, service.url, job_id, "?log=driver")
    lines = page.get_by_label("Lines of the log")
    expect(lines).to_have_text(re.compile("^line 0\n.*line 999$", re.DOTALL))
    page.get_by_role("link", name="Further lines").click()
    further = re.compile("^line 1000\n.*line 1999$", re.DOTALL)
    expect(lines).to_have_text(further)
    page.reload()
    expect(lines).to_have_text(further)
    look_at(page, "job-log")
    page.get_by_role("link", name="Further lines").click()
    expect(lines).to_have_text(re.compile("^line 2000\n.*line 2499$", re.DOTALL))
    expect(page.get_by_role("link", name="Further lines")).to_have_count(0)
    page.go_back()
    expect(lines).to_have_text(further)
    page.get_by_role("link", name="First lines").click()
    expect(lines).to_have_text(re.compile("^line 0\n", re.DOTALL))


def test_a_long_job_is_drawn_in_buckets_and_a_part_of_it_step_by_step(
    page: Page, service: Service, api: httpx.Client, file_id: str, database_url: str
) -> None:
    job_id = submit(api, file_id, suffix="long")
    api.post(f"/fine_tuning/jobs/{job_id}/cancel")
    wait_until_ended(api, job_id)
    insert_steps(database_url, job_id, range(1, 60_001))
    pack_all(database_url)
    assert counted(database_url, job_id) == (0, 60)
    sign_in(page)
    open_job(page, service.url, job_id)
    loss = page.get_by_role("figure", name="Loss")
    expect(loss).to_have_attribute("aria-label", re.compile("600 points, steps 100 to 60,000$"))
    expect(page.get_by_text("Each point is the mean of 100 steps")).to_be_visible()
    open_job(page, service.url, job_id, "?from=30001&to=30080")
    expect(loss).to_have_attribute("aria-label", re.compile("80 points, steps 30,001 to 30,080$"))


def test_the_curves_mark_where_an_attempt_went_on(
    page: Page, service: Service, api: httpx.Client, file_id: str
) -> None:
    job_id = submit(api, file_id)
    sign_in(page)
    open_job(page, service.url, job_id)
    loss, status = page.get_by_role("figure", name="Loss"), page.locator(".heading .status")
    expect(loss).to_be_visible()
    page.get_by_role("button", name="Pause").click()
    expect(status).to_have_text("paused")
    page.get_by_role("button", name="Resume").click()
    wait_until_ended(api, job_id)
    events = api.get(f"/fine_tuning/jobs/{job_id}/events", params={"type": "message", "limit": 100}).json()["data"]
    second, first = (event["data"] for event in events if "resumed_from" in (event["data"] or {}))
    assert (first, second["attempt"]) == ({"attempt": 1, "resumed_from": 0}, 2)
    expect(loss).to_have_attribute("aria-label", re.compile(f"; attempt 2 from step {second['resumed_from'] + 1}$"))
    look_at(page, "job-resumed")


def test_a_job_is_paused_resumed_and_cancelled_by_keyboard(
    page: Page, service: Service, api: httpx.Client, file_id: str
) -> None:
    service.ray.down = True  # so that the job stays queued
    try:
        job_id = submit(api, file_id)
        sign_in(page)
        open_job(page, service.url, job_id)
        status = page.locator(".heading .status")
        for name, then in (("Pause", "paused"), ("Resume", "queued")):
            page.get_by_role("button", name=name).focus()
            page.keyboard.press("Enter")
            expect(status).to_have_text(then)
        page.get_by_role("button", name="Cancel the job").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog", name="Cancel this job?")).to_be_visible()
        page.keyboard.press("Escape")
        expect(status).to_have_text("queued")
        page.get_by_role("button", name="Cancel the job").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
        expect(status).to_have_text("cancelled")
    finally:
        service.ray.down = False
    assert api.get(f"/fine_tuning/jobs/{job_id}").json()["status"] == "cancelled"
    page.get_by_role("button", name="Delete the job").click()
    dialog = page.get_by_role("dialog", name="Delete this job?")
    dialog.get_by_role("checkbox", name="Its policy and the models of its checkpoints, too").check()
    dialog.get_by_role("button", name="Delete the job").click()
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    expect(page.get_by_role("row").filter(has_text=job_id)).to_have_count(0)
    assert api.get(f"/fine_tuning/jobs/{job_id}").status_code == 404
    page.goto(f"{service.url}/#/jobs/{job_id}")
    expect(page.get_by_role("alert")).to_contain_text("Could not find fine tune")


def test_jobs_are_listed_newest_first(page: Page, service: Service, api: httpx.Client, file_id: str) -> None:
    service.ray.down = True
    try:
        made = [submit(api, file_id, suffix=f"job-{number}") for number in range(30)]
        sign_in(page)
        rows = page.locator("tbody tr")
        expect(rows).to_have_count(25)
        expect(rows.first).to_contain_text("job-29")
        for job_id in made:
            api.post(f"/fine_tuning/jobs/{job_id}/cancel")
    finally:
        service.ray.down = False


def test_hostile_text_is_shown_and_does_nothing(page: Page, service: Service, api: httpx.Client, file_id: str) -> None:
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    metadata = {"note": f"{markup} \u202egnp.exe", "word": "w" * 512}
    job_id = submit(api, file_id, metadata=metadata)
    api.post(f"/fine_tuning/jobs/{job_id}/cancel")
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    sign_in(page)
    open_job(page, service.url, job_id)
    expect(page.get_by_text(markup)).to_be_visible()
    assert page.locator("img").count() == 0
    look_at(page, "hostile")


@pytest.mark.parametrize("view", ["jobs", "data", "evaluations", "rounds", "sweeps", "models"])
def test_a_link_to_what_was_deleted_leads_to_the_list(page: Page, service: Service, view: str) -> None:
    sign_in(page)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    page.goto(f"{service.url}/#/{view}/none-such")
    gone = page.get_by_role("alert")
    expect(gone).to_contain_text("none-such")
    expect(gone).to_contain_text("What this link leads to was deleted, or it never existed.")
    if view == "jobs":
        look_at(page, "job-gone")
    gone.get_by_role("link", name=f"See all {view}").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(view.title())


def test_a_view_that_is_not_there_is_said_in_words(page: Page, service: Service) -> None:
    sign_in(page)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    page.goto(f"{service.url}/#/nowhere")
    expect(page.get_by_text("There is no such view.")).to_be_visible()

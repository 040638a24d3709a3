"""Comparing jobs: curves over one another, how they are shown, and what differs."""

import re

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.browsing import look_at, sign_in, submit, wait_until_ended
from tests.page.conftest import Service

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jobs(api: httpx.Client, file_id: str) -> list[str]:
    """Two jobs that have ended, and one that was cancelled before its first step."""
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5}}}
    made = [
        submit(api, file_id, suffix="first", seed=7, x_raydpo={"validation_share": 0.25}),
        submit(api, file_id, suffix="a-very-long-second-name", seed=7, method=method, metadata={"<b>": "<i>x</i>"}),
        submit(api, file_id, suffix="first", seed=8),
    ]
    api.post(f"/fine_tuning/jobs/{made[2]}/cancel")
    for job_id in made:
        wait_until_ended(api, job_id)
    return made


def test_jobs_are_chosen_in_the_list_and_compared_by_keyboard(page: Page, jobs: list[str]) -> None:
    sign_in(page)
    page.get_by_role("checkbox", name="Compare a-very-long-second-name").focus()
    page.keyboard.press("Space")
    expect(page.get_by_text("Choose another job to compare with.")).to_be_visible()
    page.get_by_label("Status").select_option("succeeded")  # the choice stays
    page.get_by_role("checkbox", name="Compare first").check()
    look_at(page, "jobs-chosen")
    page.get_by_role("link", name="Compare 2 jobs").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Compare")).to_be_visible()
    expect(page).to_have_url(re.compile(r"#/jobs/compare\?jobs=ftjob"))
    loss = page.get_by_role("figure", name="Loss, training")
    expect(loss).to_have_attribute(
        "aria-label", re.compile("a-very-long-second-name from .* first from .* steps 1 to 80$")
    )
    table = page.get_by_role("region", name="Settings and last metrics")
    rows = table.get_by_role("row")
    expect(rows.filter(has_text="beta")).to_contain_text("0.50.2")
    expect(rows.filter(has_text="metadata.<b>")).to_contain_text("<i>x</i>–")
    expect(rows.filter(has_text="validation_share")).to_contain_text("–0.25")
    expect(rows.filter(has_text="seed")).to_have_count(0)
    expect(rows.filter(has_text="train_loss")).to_be_visible()
    look_at(page, "compare")
    page.get_by_label("All settings").check()
    expect(rows.filter(has_text="seed")).to_contain_text("77")


def test_smoothing_a_logarithmic_axis_and_a_range_stand_in_the_address(
    page: Page, service: Service, jobs: list[str]
) -> None:
    sign_in(page)
    page.goto(f"{service.url}/#/jobs/compare?jobs={','.join(jobs)}")
    loss = page.get_by_role("figure", name="Loss, training")
    expect(loss).to_be_visible()
    raw = loss.get_attribute("aria-label")
    page.get_by_label("Smoothing").focus()
    page.keyboard.press("End")
    expect(page).to_have_url(re.compile("smoothing=0.99"))
    expect(loss).not_to_have_attribute("aria-label", raw or "")
    page.get_by_label("Logarithmic axis").check()
    page.get_by_label("to", exact=True).fill("20")
    page.keyboard.press("Enter")
    page.reload()
    expect(loss).to_have_attribute("aria-label", re.compile("20 points, steps 1 to 20$"))
    expect(page.get_by_label("Logarithmic axis")).to_be_checked()
    expect(page.get_by_label("Smoothing")).to_have_value("0.99")
    expect(page.get_by_role("figure", name="Log-probabilities, chosen", exact=False).first).to_contain_text("linear")
    page.get_by_label("Smoothing").fill("0.8")
    page.get_by_role("button", name="All steps").click()
    look_at(page, "compare-smoothed")
    page.get_by_role("button", name=re.compile("Leave first…")).first.click()
    expect(page.locator("thead th")).to_have_count(2)


def test_the_curves_of_one_job_are_smoothed_as_well(page: Page, service: Service, jobs: list[str]) -> None:
    sign_in(page)
    page.goto(f"{service.url}/#/jobs/{jobs[0]}?smoothing=0.9&log-axis=1")
    expect(page.get_by_role("figure", name="Loss")).to_be_visible()
    look_at(page, "job-smoothed")
    page.get_by_role("link", name="Compare", exact=True).click()
    expect(page.get_by_text("Choose another job to compare with.")).to_be_visible()


def test_what_cannot_be_compared_is_said_in_words(page: Page, service: Service, jobs: list[str]) -> None:
    sign_in(page)
    page.goto(f"{service.url}/#/jobs/compare?jobs={jobs[0]}")
    expect(page.get_by_text("Choose at least two jobs")).to_be_visible()
    page.goto(f"{service.url}/#/jobs/compare?jobs={jobs[0]},ftjob-none")
    expect(page.get_by_role("alert")).to_contain_text("ftjob-none")
    page.goto(f"{service.url}/#/jobs/compare?jobs={jobs[0]},{jobs[2]}&from=1000")
    expect(page.get_by_text("None of these jobs has taken a step in this range.")).to_be_visible()

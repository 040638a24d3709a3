"""The list of sweeps, and one: its trials, and the frontier, which can be zoomed and leads to jobs."""

import json
import re
import time
from typing import Any

import httpx
import psycopg
import pytest
from playwright.sync_api import Page, Route, expect

from tests.page.browsing import look_at, sign_in, wait_until_ended
from tests.page.conftest import Service

pytestmark = pytest.mark.slow

BETA = "method.*.hyperparameters.beta"
EVALUATIONS = {"polite": {"kind": "score"}, "moved": {"kind": "drift"}}
FOUND = {0.05: (8.0, 0.95), 0.2: (3.0, 0.9), 1.0: (0.5, 0.6)}  # KL and reward


def estimate(value: float, around: float) -> dict[str, float]:
    return {"value": value, "low": value - around, "high": value + around}


def sweep(api: httpx.Client, file_id: str, **more: Any) -> str:
    job = {"model": "tiny", "training_file": file_id, "x_raydpo": {"validation_share": 0.2}, "method": {"type": "dpo"}}
    parameters = {"method.type": {"values": ["dpo", "ipo"]}, BETA: {"values": list(FOUND)}}
    body = {"job": job, "parameters": parameters, "metric": {"name": "eval/loss"}, **more}
    answer = api.post("/x/sweeps", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def sweep_id(api: httpx.Client, file_id: str, database_url: str) -> str:
    """A sweep that has ended. Its jobs were trained; what evaluations would have found is written into the database,
    because no engine here answers them.
    """
    made = sweep(api, file_id)
    deadline = time.monotonic() + 600
    while api.get(f"/x/sweeps/{made}").json()["status"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    trials = api.get(f"/x/sweeps/{made}/trials").json()["data"]
    assert [trial["status"] for trial in trials] == ["succeeded"] * 6
    with psycopg.connect(database_url, autocommit=True) as connection:
        told = json.dumps(EVALUATIONS)
        connection.execute("UPDATE sweeps SET spec = spec || jsonb_build_object('evaluations', %s::jsonb)", (told,))
        for trial in trials:
            kl, reward = FOUND[trial["parameters"][BETA]]
            worse = 0.2 if trial["parameters"]["method.type"] == "ipo" else 0.0
            results = {
                "moved": {"kl_per_sequence": estimate(kl, 0.3)},
                "polite": {"score": estimate(reward - worse, 0.05)},
            }
            of_it = (json.dumps(results), kl, made, trial["id"])
            told = "results = %s, value = %s"
            connection.execute(f"UPDATE sweep_trials SET {told} WHERE sweep_id = %s AND number = %s", of_it)
    return made


def test_a_sweep_shows_its_trials_and_the_best(page: Page, service: Service, sweep_id: str) -> None:
    sign_in(page)
    page.get_by_role("link", name="Sweeps").click()
    row = page.get_by_role("row").filter(has_text=sweep_id)
    expect(row).to_contain_text("6 of 6: 6 succeeded")
    expect(row).to_contain_text("type dpo, beta 1: 0.5")
    look_at(page, "sweeps")
    row.get_by_role("link", name="type, beta").click()
    expect(page.get_by_role("row")).to_have_count(7)
    expect(page.get_by_role("row").nth(1)).to_contain_text("the best")
    expect(page.get_by_role("row").nth(1).get_by_role("cell").nth(1)).to_have_text("1")
    look_at(page, "sweep")


def test_the_frontier_is_zoomed_and_each_point_leads_to_its_job(page: Page, service: Service, sweep_id: str) -> None:
    sign_in(page)
    page.goto(f"{service.url}/#/sweeps/{sweep_id}")
    points = page.locator(".frontier .point")
    expect(points).to_have_count(6)
    expect(page.get_by_role("link", name="dpo, beta 0.2: KL 3 (2.7 to 3.3), reward 0.9 (0.85 to 0.95)")).to_be_visible()
    page.get_by_label("KL from").fill("2")
    page.keyboard.press("Tab")
    expect(points).to_have_count(4)
    page.reload()
    expect(points).to_have_count(4)
    page.get_by_role("button", name="All points").click()
    expect(points).to_have_count(6)
    box = page.locator(".frontier svg").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 200, steps=4)
    page.mouse.up()
    expect(points).to_have_count(2)
    expect(page).to_have_url(re.compile(r"from=\d.*to=\d"))
    points.first.focus()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("#/jobs/ftjob-"))


def test_ranges_in_which_numbers_have_no_room_for_marks_are_drawn(page: Page, service: Service, sweep_id: str) -> None:
    sign_in(page)
    chart = page.locator(".frontier svg")
    for query in ("from=1e17&to=100000000000000016", "from=0.7&to=0.7000000000000001"):
        page.goto(f"{service.url}/#/sweeps/{sweep_id}?{query}")
        expect(chart).to_have_attribute("aria-label", "0 of 6 policies")

    def huge(route: Route) -> None:
        answer = route.fetch()
        told = answer.json()
        for point in told["data"]:
            point["reward"] = {"value": 1e17, "low": 1e17, "high": 1e17 + 16}
        route.fulfill(response=answer, json=told)

    page.route(f"**/v1/x/sweeps/{sweep_id}/frontier", huge)
    page.goto(f"{service.url}/#/sweeps/{sweep_id}")
    page.reload()
    expect(chart).to_have_attribute("aria-label", "6 of 6 policies")


def test_a_view_loads_again_only_after_its_load_and_only_what_may_change(
    page: Page, service: Service, sweep_id: str
) -> None:
    page.clock.install()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    held: list[Route] = []
    page.route(f"**/v1/x/sweeps/{sweep_id}", lambda route: held.append(route))
    sign_in(page)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()

    def times(place: str) -> int:
        page.clock.run_for(30_000)
        page.evaluate("fetch('/healthz').then(() => null)")  # what was asked before this is known when it ends
        return asked.count(f"{service.url}/v1/x/sweeps{place}")

    with page.expect_request(f"**/v1/x/sweeps/{sweep_id}"):
        page.goto(f"{service.url}/#/sweeps/{sweep_id}")
    assert times(f"/{sweep_id}") == 1
    held[0].continue_()
    expect(page.locator(".frontier .point")).to_have_count(6)
    assert times(f"/{sweep_id}") == 1
    page.goto(f"{service.url}/#/sweeps/none")
    expect(page.get_by_role("alert")).to_contain_text("There is no sweep 'none'")
    assert times("/none") == 1
    page.goto(f"{service.url}/#/sweeps")
    expect(page.get_by_role("row").filter(has_text=sweep_id)).to_be_visible()
    assert times("?limit=25") > 1


def test_a_sweep_is_cancelled_with_its_jobs_and_deleted_after_questions(
    page: Page, service: Service, api: httpx.Client, file_id: str
) -> None:
    made = sweep(api, file_id, parameters={"seed": {"values": list(range(8))}}, max_running_jobs=1)
    sign_in(page)
    page.goto(f"{service.url}/#/sweeps/{made}")
    expect(page.get_by_role("link", name="Trial 0")).to_be_visible()
    page.get_by_role("button", name="Cancel the sweep").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel the sweep").click()
    expect(page.locator(".heading .status")).to_have_text("cancelled")
    for trial in api.get(f"/x/sweeps/{made}/trials").json()["data"]:
        wait_until_ended(api, trial["job_id"])
    page.get_by_role("button", name="Delete the sweep").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete the sweep").click()
    expect(page.get_by_role("heading", name="Sweeps")).to_be_visible()
    expect(page.get_by_role("row").filter(has_text=made)).to_have_count(0)
    page.goto(f"{service.url}/#/sweeps/none")
    expect(page.get_by_role("alert")).to_contain_text("There is no sweep 'none'")


def vary(page: Page, name: str, values: str) -> None:
    """Chooses an option that the trials differ in, and its values, by the keyboard."""
    page.get_by_label("Option", exact=True).select_option(label=name)
    page.get_by_role("button", name="Vary this option").focus()
    page.keyboard.press("Enter")
    field = page.get_by_role("group", name=name, exact=True).get_by_label("values")
    expect(field).to_be_focused()
    page.keyboard.type(values)
    page.keyboard.press("Tab")


def test_a_sweep_is_made_in_a_form(page: Page, service: Service, api: httpx.Client, file_id: str) -> None:
    sign_in(page)
    page.get_by_role("link", name="Sweeps").click()
    page.get_by_role("link", name="New sweep").click()
    page.locator("[id='job.training_file']").select_option(file_id)
    page.locator("[id='job.model']").select_option("tiny")
    expect(page.get_by_role("region", name="Plan")).to_contain_text(re.compile("The job|There is no plan"))
    page.get_by_label("validation_share").fill("0.2")
    vary(page, "method.type", "dpo, ipo")
    vary(page, "beta", "0.05, 0.2")
    vary(page, "seed", "1")
    page.get_by_role("button", name="Do not vary seed").click()
    name = page.locator("[id='metric.name']")
    name.fill("eval/los")
    page.keyboard.press("Enter")
    expect(page.locator(".field", has=name)).to_contain_text("Did you mean 'eval/loss'?")
    expect(name).to_be_focused()
    name.fill("eval/loss")
    page.keyboard.press("Tab")
    page.reload()  # the draft stands in the address
    expect(page.get_by_role("group", name="beta", exact=True).get_by_label("values")).to_have_value("0.05, 0.2")
    look_at(page, "new-sweep")
    page.get_by_role("button", name="Create the sweep").click()
    expect(page).to_have_url(re.compile(r"#/sweeps/sweep-\w+$"))
    expect(page.get_by_role("heading", name="Sweep", exact=True)).to_be_visible()
    made = api.post(f"/x/sweeps/{page.url.rpartition('/')[2]}/cancel").json()
    assert made["num_trials"] == 4
    request = made["request"]
    values = {path: parameter["values"] for path, parameter in request["parameters"].items()}
    assert values == {"method.type": ["dpo", "ipo"], BETA: [0.05, 0.2]}
    assert (request["metric"]["name"], request["job"]["training_file"]) == ("eval/loss", file_id)


def test_a_sweep_that_draws_values_has_ranges(page: Page, service: Service, file_id: str) -> None:
    sign_in(page)
    page.goto(f"{service.url}/#/sweeps/new?job.training_file={file_id}&job.model=tiny")
    page.get_by_role("button", name="Create the sweep").click()
    expect(page.locator(".field", has=page.get_by_label("Option", exact=True))).to_contain_text("at least 1 item")
    vary(page, "beta", "")
    beta = page.get_by_role("group", name="beta", exact=True)
    expect(beta.get_by_label("min", exact=True)).to_have_count(0)
    page.locator("[id='search.type']").select_option("random")
    beta.get_by_label("min", exact=True).fill("0.5")
    beta.get_by_label("max", exact=True).fill("0.1")
    page.locator("[id='search.num_trials']").fill("4")
    page.keyboard.press("Enter")
    expect(beta).to_contain_text("'min' is 0.5, but it must be less than 'max'")
    expect(beta).to_be_focused()

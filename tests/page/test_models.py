"""The list of models with their states, loading and unloading, and one model: its weights, and who shares it."""

import re
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from services import storage
from services.control_plane.models.deployments.checks import OF_REWARD_MODELS
from services.deployment_settings import DeploymentSettings
from tests.page.browsing import look_at, sign_in, submit, wait_until_ended
from tests.page.conftest import Service
from tests.services.control_plane.conftest import api_of, new_key, new_project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy(service: Service, api: httpx.Client, file_id: str) -> str:
    """A policy with a file of weights."""
    job_id = submit(api, file_id, suffix="shop")
    wait_until_ended(api, job_id)
    job = api.get(f"/fine_tuning/jobs/{job_id}").json()
    assert job["status"] == "succeeded", job
    weights = storage.join(service.storage_url, "runs", job_id, "export", "adapter_model.safetensors")
    storage.write_bytes(weights, b"weights")
    return str(job["fine_tuned_model"])


def open_models(page: Page, service: Service) -> None:
    sign_in(page)
    page.get_by_role("link", name="Models").click()
    expect(page.get_by_role("heading", name="Models", exact=True)).to_be_visible()


def open_model(page: Page, service: Service, policy: str) -> None:
    open_models(page, service)
    page.get_by_role("link", name=policy, exact=True).click()
    expect(page.get_by_role("heading", name=policy, exact=True)).to_be_visible()


def test_models_are_listed_loaded_and_unloaded_by_keyboard(page: Page, service: Service, policy: str) -> None:
    open_models(page, service)
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="polite"))
    expect(row).to_contain_text("base model")
    expect(row).to_contain_text("unloaded")
    expect(page.get_by_role("row").filter(has_text=policy).first).to_contain_text("policy on tiny, an adapter")
    page.get_by_role("button", name="Load polite").focus()
    page.keyboard.press("Enter")
    expect(row).to_contain_text("running")
    expect(row).to_contain_text("1 replica · 1 request in flight · 25 tokens/s · first token after 200 ms")
    look_at(page, "models")
    page.get_by_role("button", name="Unload polite").focus()
    page.keyboard.press("Enter")
    expect(row).to_contain_text("unloaded")


def test_an_adapter_is_loaded_on_the_engine_of_its_base(page: Page, service: Service, policy: str) -> None:
    open_model(page, service, policy)
    page.get_by_role("button", name=f"Load {policy}", exact=True).click()
    expect(page.locator(".heading .status")).to_have_text("running")
    expect(page.get_by_role("button", name="Unload")).to_have_count(0)
    expect(page.get_by_text("whose settings these are")).to_be_visible()
    page.get_by_role("link", name="tiny", exact=True).first.click()
    expect(page.get_by_role("heading", name="tiny", exact=True)).to_be_visible()
    expect(page.get_by_text("A base model is the operator's.")).to_be_visible()
    page.get_by_role("button", name="Unload").click()
    expect(page.locator(".heading .status")).to_have_text("unloaded")


def test_the_settings_of_a_model_are_chosen_in_a_form(page: Page, service: Service, api: httpx.Client) -> None:
    open_model(page, service, "polite")
    page.get_by_role("link", name="Change the settings").click()
    expect(page.get_by_role("heading", name="How it is served")).to_be_visible()
    expect(page.locator("[id='mode']")).to_have_count(0)  # of adapters only
    page.get_by_text("More options").click()
    for name, field in DeploymentSettings.model_fields.items():
        if name != "mode":
            words = str(field.description).replace("`", "")
            place = page.locator(".field, fieldset", has_text=words)
            expect(place.last).to_be_visible()
    page.get_by_label("tool_call_parser").select_option("hermes")
    page.get_by_label("max_cpu_loras").fill("2")
    page.keyboard.press("Enter")
    refused = page.locator(".field", has=page.get_by_label("max_cpu_loras"))
    expect(refused).to_contain_text("max_cpu_loras is 2, less than max_loras, which is 4")
    expect(page.get_by_label("max_cpu_loras")).to_be_focused()
    look_at(page, "model-settings")
    page.get_by_label("max_cpu_loras").fill("8")
    page.get_by_label("prefix_caching").select_option("false")
    page.get_by_role("button", name="Store the settings").click()
    expect(page.get_by_role("heading", name="polite", exact=True)).to_be_visible()
    expect(page.get_by_text("hermes chosen")).to_be_visible()
    chosen = {"tool_call_parser": "hermes", "max_cpu_loras": 8, "prefix_caching": False}
    assert api.get("/x/deployments/polite").json()["chosen"] == chosen
    page.get_by_role("link", name="Change the settings").click()
    expect(page.get_by_label("max_cpu_loras")).to_have_value("8")
    page.get_by_role("link", name="All defaults").click()
    expect(page.get_by_label("max_cpu_loras")).to_have_value("")
    page.get_by_role("button", name="Store the settings").click()
    expect(page.get_by_role("heading", name="polite", exact=True)).to_be_visible()
    assert api.get("/x/deployments/polite").json()["chosen"] == {}


def test_an_adapter_has_settings_of_its_own_once_it_is_merged(
    page: Page, service: Service, api: httpx.Client, policy: str
) -> None:
    open_model(page, service, policy)
    page.get_by_role("link", name="Change the settings").click()
    expect(page.get_by_label("mode")).to_be_visible()
    expect(page.get_by_label("dtype")).to_have_count(0)
    look_at(page, "adapter-settings")
    page.get_by_label("mode").select_option("merged")
    page.get_by_label("dtype").select_option("bfloat16")
    page.get_by_label("max", exact=True).fill("2")
    page.get_by_role("button", name="Store the settings").click()
    expect(page.get_by_role("heading", name=policy, exact=True)).to_be_visible()
    chosen = {"mode": "merged", "dtype": "bfloat16", "replicas": {"max": 2}}
    assert api.get(f"/x/deployments/{policy}").json()["chosen"] == chosen
    api.delete(f"/x/deployments/{policy}")


def test_a_reward_model_has_only_the_settings_that_are_of_use(
    page: Page, service: Service, api: httpx.Client, file_id: str
) -> None:
    job_id = submit(api, file_id, method={"type": "reward_bradley_terry"})
    wait_until_ended(api, job_id)
    model = api.get(f"/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"]
    open_model(page, service, model)
    page.get_by_role("link", name="Change the settings").click()
    for name in DeploymentSettings.model_fields:
        expect(page.locator(f"[id='{name}']")).to_have_count(int(name in OF_REWARD_MODELS))


def test_weights_are_saved_and_the_commands_for_them_shown(
    page: Page, service: Service, policy: str, tmp_path: Path
) -> None:
    open_model(page, service, policy)
    expect(page.get_by_text(f"raydpo models download {policy} ./weights")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Download {policy}").click()
    download.value.save_as(tmp_path / "weights.tar")
    assert download.value.suggested_filename == f"{policy.replace(':', '-')}.tar"
    assert b"adapter_model.safetensors" in (tmp_path / "weights.tar").read_bytes()


def test_a_policy_scores_answers_that_the_reader_writes(page: Page, service: Service, policy: str) -> None:
    open_model(page, service, policy)
    page.get_by_role("link", name="Score answers").click()
    page.get_by_label("Prompt").fill("Where is the saw?")
    page.get_by_role("button", name="One more answer").click()
    for number, text in enumerate(("No.", "Aisle four, on the left.", "There."), 1):
        page.get_by_label(f"Answer {number}").fill(text)
    service.ray.down = True  # the models load no sooner than this is seen
    try:
        page.get_by_role("button", name="Score", exact=True).click()
        expect(page.get_by_text("cannot be reached, because the Ray cluster")).to_be_visible()
    finally:
        service.ray.down = False
    best = page.get_by_role("row").filter(has_text="the best one")
    expect(best).to_contain_text("Aisle four, on the left.")
    expect(best).to_contain_text("2.4")  # 24 characters, 0.5 nats each, beta 0.2
    expect(best).to_contain_text("12 nats")
    expect(page.get_by_text("Compared with tiny, β is 0.2.")).to_be_visible()
    shares = page.locator("td[data-label=Preferred]").all_inner_texts()
    assert sum(float(share.removesuffix(" %")) for share in shares) == pytest.approx(100, abs=0.2)
    assert "Aisle" not in page.url
    look_at(page, "rewards")
    page.get_by_role("button", name="One answer less").click()
    page.get_by_label("β").fill("0.5")
    page.keyboard.press("Enter")
    expect(best).to_contain_text("6")
    expect(page.get_by_role("rowheader")).to_have_count(2)


def test_a_base_model_scores_answers_against_a_reference_that_is_named(page: Page, service: Service) -> None:
    open_model(page, service, "polite")
    page.get_by_role("link", name="Score answers").click()
    page.get_by_label("Prompt").fill("Hi")
    page.get_by_label("Answer 1").fill("Hello!")
    page.get_by_label("Answer 2").fill("What?")
    page.get_by_label("Reference").select_option("tiny")
    page.get_by_label("β").fill("1")
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.get_by_role("row").filter(has_text="the best one")).to_contain_text("Hello!")


def test_a_model_leads_to_its_evaluation(page: Page, service: Service, policy: str) -> None:
    open_model(page, service, policy)
    page.get_by_role("link", name="Evaluate", exact=True).click()
    expect(page.locator("[id='model']")).to_have_value(policy)


def test_a_model_is_shared_and_no_longer(page: Page, service: Service, api: httpx.Client, policy: str) -> None:
    guest = new_project(api, "guests of the page")
    open_model(page, service, policy)
    expect(page.get_by_text("No other project uses this model.")).to_be_visible()
    page.get_by_label("Id of a project").fill("proj_none")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("'proj_none', which is not the id of an active project")
    page.get_by_label("Id of a project").fill(guest)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name=f"Stop sharing with {guest}")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_label("Id of a project")).to_have_value("")
    look_at(page, "model")
    with api_of(service.url, new_key(api, project_id=guest)["value"]) as theirs:
        assert theirs.get(f"/models/{policy}").status_code == 200
        page.get_by_role("button", name=f"Stop sharing with {guest}").click()
        expect(page.get_by_text("No other project uses this model.")).to_be_visible()
        assert theirs.get(f"/models/{policy}").status_code == 404


def test_what_the_key_may_not_see_and_what_is_not_known_is_said(
    page: Page, service: Service, api: httpx.Client, policy: str
) -> None:
    sign_in(page, new_key(api, scopes=["read"])["value"])
    service.ray.down = True
    try:
        page.goto(f"{service.url}/#/models/{policy}")
        expect(
            page.get_by_text("The Ray cluster does not answer, so the state of models is not known.")
        ).to_be_visible()
        expect(page.get_by_role("alert")).to_contain_text("needs a key with the scope 'admin'")
        look_at(page, "model-unknown")
        page.goto(f"{service.url}/#/models")
        expect(page.get_by_text("The Ray cluster does not answer")).to_be_visible()
        expect(page.get_by_text("not known", exact=True).first).to_be_visible()
        look_at(page, "models-unknown")
    finally:
        service.ray.down = False
    expect(page.get_by_text("unloaded").first).to_be_visible()
    page.get_by_role("button", name="Load polite").click()
    expect(page.get_by_role("alert")).to_contain_text("scope 'write'")
    page.goto(f"{service.url}/#/models/none")
    expect(page.get_by_role("alert")).to_contain_text("The model 'none' does not exist.")


def test_a_model_is_deleted_after_a_question(page: Page, service: Service, api: httpx.Client, policy: str) -> None:
    open_model(page, service, policy)
    page.get_by_role("button", name="Delete the model").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep it").click()
    page.get_by_role("button", name="Delete the model").focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog").get_by_role("button", name="Delete the model").click()
    expect(page).to_have_url(re.compile("#/models$"))
    expect(page.get_by_role("link", name=policy, exact=True)).to_have_count(0)
    assert api.get(f"/models/{policy}").status_code == 404


def test_a_service_without_models_says_how_to_add_one(page: Page, service: Service) -> None:
    page.route("**/v1/models*", lambda route: route.fulfill(json={"object": "list", "data": [], "has_more": False}))
    sign_in(page)
    for view in ("jobs/new", "ask", "models"):
        page.goto(f"{service.url}/#/{view}")
        expect(page.get_by_text("raydpo up --model NAME=SOURCE")).to_be_visible()
    look_at(page, "models-none")

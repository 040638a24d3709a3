"""What the tests of the page share: how they look at it, and where the pictures go."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from services.control_plane.page.api import BUILT
from tests.services.control_plane.conftest import API_KEY

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
AXE = ROOT / "page" / "node_modules" / "axe-core" / "axe.min.js"
SIZES = {"wide": (1280, 800), "narrow": (390, 844)}
CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
SEE_CHARTS = """async () => {
    for (const chart of document.querySelectorAll("figure.curve")) {
        chart.scrollIntoView();
        for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
    }
    scrollTo(0, 0);
}"""  # a chart that is out of sight is not drawn
expect.set_options(timeout=120_000)  # a guard against hanging, on a machine that is busy


@contextmanager
def chromium() -> Iterator[Browser]:
    """Starts a browser. The test is skipped where there is none, or where the page is not built."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    if not (BUILT / "index.html").exists():
        pytest.skip("the page is not built: make page")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def tab(browser: Browser, url: str) -> Iterator[Page]:
    """Opens the page in a new tab, without the memory of other tabs. It must see no error of our scripts and nothing
    that the policy of the page's content refuses."""
    errors: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-GB", timezone_id="Europe/Berlin")
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    refusals = ("Content Security Policy", "Uncaught")
    page.on("console", lambda said: errors.append(said.text) if any(word in said.text for word in refusals) else None)
    page.goto(f"{url}/")
    yield page
    context.close()
    assert errors == []


def sign_in(page: Page, key: str = API_KEY) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in", exact=True).click()


def look_at(page: Page, name: str) -> None:
    """Takes pictures of the view, wide and narrow, light and dark; axe finds nothing serious in any of them."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for size, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate(SEE_CHARTS)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
            page.wait_for_timeout(150)  # charts are drawn anew
            page.screenshot(path=SCREENSHOTS / f"{name}-{size}-{scheme}.png", full_page=True)
            _check_access(page, f"{name}, {size}, {scheme}")
        hidden = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert hidden <= 0, f"{name}, {size}: {hidden} pixels are beyond the edge"
    page.set_viewport_size(dict(zip(("width", "height"), SIZES["wide"], strict=True)))  # type: ignore[arg-type]
    page.emulate_media(color_scheme="light")


def _check_access(page: Page, where: str) -> None:
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text())
    found: list[dict[str, Any]] = page.evaluate("axe.run().then((found) => found.violations)")
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    told = [f"{each['id']}: {[node['html'][:200] for node in each['nodes']]}" for each in serious]
    assert not serious, f"{where}: {json.dumps(told, indent=1)}"


def submit(api: httpx.Client, file_id: str, **changes: Any) -> str:
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}
    answer = api.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id, "method": method} | changes)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def wait_until_ended(api: httpx.Client, job_id: str) -> None:
    for _ in range(600):
        if api.get(f"/fine_tuning/jobs/{job_id}").json()["finished_at"]:
            return
        time.sleep(0.5)
    raise AssertionError(f"{job_id} has not ended after five minutes")


def open_job(page: Page, url: str, job_id: str, query: str = "") -> None:
    page.goto(f"{url}/#/jobs/{job_id}{query}")
    expect(page.get_by_role("heading", level=1)).to_be_visible()

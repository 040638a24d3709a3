"""Texts of others that try to do something: on every view they are shown, and nothing more."""

import json
import time
from dataclasses import dataclass
from urllib.parse import quote

import httpx
import psycopg
import pytest
from playwright.sync_api import Page, expect

from services import storage
from tests.page.browsing import SIZES, look_at, sign_in, submit
from tests.page.conftest import Service
from tests.services.control_plane.conftest import new_key, new_project, pairs

pytestmark = pytest.mark.slow
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
TURNED = "safe \u202egnp.exe"
SHOWN = "safe ⟨U+202E⟩gnp.exe"
FILE = "<img src=x onerror=alert(1)> שלום 1.jsonl"  # the service refuses names with characters that nobody sees
LONG = "w" * 100_000
EVENT = """
    INSERT INTO events (public_id, job_id, attempt, level, type, message) VALUES (%s, %s, 0, 'info', 'message', %s)
"""


@dataclass(frozen=True)
class Planted:
    """The ids of the objects with hostile texts."""

    job: str
    file: str
    project: str
    evaluation: str
    sweep: str
    rounds: str


@pytest.fixture(scope="module")
def planted(service: Service, api: httpx.Client, database_url: str) -> Planted:
    """Plants hostile texts in all that users, models, jobs and Ray tell."""
    upload = {"files": {"file": (FILE, pairs())}, "data": {"purpose": "fine-tune"}}
    file_id = api.post("/files", **upload).json()["id"]
    project = new_project(api, f"<b onclick=alert(3)> {TURNED}")
    new_key(api, name=f"<i onclick=alert(4)> {TURNED}")
    service.ray.down = True
    job = submit(api, file_id, metadata={"note": f"{MARKUP} {TURNED}", f"<b>{TURNED}"[:60]: "w" * 512})
    api.post(f"/fine_tuning/jobs/{job}/cancel")
    sweep = _sweep(api, file_id)
    service.ray.down = False
    judge = {"type": "regex", "pattern": f"{TURNED} {'w' * 900}"}
    asked = {"kind": "score", "model": "tiny", "judge": judge, "rows": [{"prompt": f"{MARKUP} {TURNED}"}]}
    evaluation = api.post("/x/evaluations", json=asked).json()["id"]
    api.post(f"/x/evaluations/{evaluation}/cancel")
    asked = {"model": "tiny", "judge": judge, "rows": asked["rows"]}
    rounds = api.post("/x/rounds", json=asked).json()["id"]
    api.post(f"/x/rounds/{rounds}/cancel")
    error = {"code": "engine_failed", "message": f"{MARKUP} {TURNED} {LONG}", "param": None}
    with psycopg.connect(database_url) as rows:
        rows.execute("UPDATE jobs SET observed = 'failed', error = %s WHERE id = %s", (json.dumps(error), job))
        for number, text in enumerate((MARKUP, TURNED, LONG)):
            values = (f"ftevent-hostile-{number}", job, f"event {text}")
            rows.execute(
                EVENT,
                values,
            )
        for table, object_id in (("evaluations", evaluation), ("sweeps", sweep), ("rounds", rounds)):
            changes = f"UPDATE {table} SET state = 'failed', error = %s, waits_for = %s WHERE id = %s"
            rows.execute(changes, (json.dumps(error), f"{MARKUP} {TURNED}", object_id))
        items = "UPDATE evaluation_items SET error = %s WHERE evaluation_id = %s"
        rows.execute(items, (json.dumps(error), evaluation))
        values = "parameters = %s, error = %s, state = 'succeeded', value = 1"
        parameters = json.dumps({"seed": f"{MARKUP} {TURNED} {'w' * 1000}"})
        rows.execute(f"UPDATE sweep_trials SET {values} WHERE sweep_id = %s", (parameters, json.dumps(error), sweep))
    log = f"{MARKUP}\n{TURNED}\n{LONG}\n".encode() + b"\xff\xed\xa0\x80\n"
    storage.write_bytes(storage.join(service.storage_url, "runs", job, "logs", "1", "driver", "000000000000.log"), log)
    return Planted(job, file_id, project, evaluation, sweep, rounds)


def _sweep(api: httpx.Client, file_id: str) -> str:
    """Returns the id of a cancelled sweep that has a trial and a metric."""
    job = {"model": "tiny", "training_file": file_id, "x_raydpo": {"validation_share": 0.2}, "method": {"type": "dpo"}}
    body = {"job": job, "parameters": {"seed": {"values": [1]}}, "metric": {"name": "eval/loss"}}
    made = str(api.post("/x/sweeps", json=body).json()["id"])
    deadline = time.monotonic() + 300
    while not api.get(f"/x/sweeps/{made}/trials").json()["data"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert api.post(f"/x/sweeps/{made}/cancel").status_code == 200
    return made


DRAFT = quote(f"{MARKUP} {TURNED}")
VIEWS = {
    "jobs": ("jobs", f"{MARKUP} {SHOWN}"),
    "job": ("jobs/{job}?log=driver", f"event {SHOWN}"),
    "new-job": ("jobs/new?training_file={file}", FILE),
    "compare": ("jobs/compare?jobs={job},{job}", "Compare"),
    "data": ("data", FILE),
    "file": ("data/{file}", FILE),
    "ask": ("ask", "Ask two policies"),
    "models": ("models", "Models"),
    "evaluations": ("evaluations", SHOWN),
    "new-evaluation": (f"evaluations/new?file={{file}}&model={DRAFT}&rows={DRAFT}", SHOWN),
    "evaluation": ("evaluations/{evaluation}", SHOWN),
    "new-rounds": (f"rounds/new?file={{file}}&model={DRAFT}&rows={DRAFT}", SHOWN),
    "all-rounds": ("rounds", SHOWN),
    "rounds": ("rounds/{rounds}", SHOWN),
    "new-sweep": (f"sweeps/new?job.training_file={{file}}&job.model={DRAFT}&vary={DRAFT}", SHOWN),
    "sweeps": ("sweeps", SHOWN),
    "sweep": ("sweeps/{sweep}", SHOWN),
    "keys": ("admin/keys", f"<i onclick=alert(4)> {SHOWN}"),
    "projects": ("admin/projects", f"<b onclick=alert(3)> {SHOWN}"),
    "project": ("admin/projects/{project}", f"<b onclick=alert(3)> {SHOWN}"),
    "usage": ("admin/usage", "Usage"),
    "audit": ("admin/audit", "Audit"),
    "not-found": (f"{MARKUP}/{TURNED}", "There is no such view."),
}


@pytest.mark.parametrize("name", VIEWS)
def test_hostile_texts_are_shown_on_every_view_and_do_nothing(
    page: Page, service: Service, planted: Planted, name: str
) -> None:
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    sign_in(page)
    place, text = VIEWS[name]
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    page.goto(f"{service.url}/#/{place.format(**vars(planted))}")
    expect(page.locator("main").get_by_text(text).first).to_be_attached()
    for width, height in SIZES.values():
        page.set_viewport_size({"width": width, "height": height})
        hidden = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert hidden <= 0, f"{hidden} pixels are beyond the edge at {width}"
    assert page.locator("main img, main script, main [onclick]").count() == 0
    assert "\u202e" not in page.locator("main").inner_text()


def test_hostile_answers_thoughts_and_errors_of_models_do_nothing(page: Page, service: Service) -> None:
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    service.engine.answers |= {"tiny": [f"?{MARKUP}", MARKUP, TURNED, "\ud83d", LONG], "polite": [f"?{TURNED}", TURNED]}
    sign_in(page)
    page.goto(f"{service.url}/#/ask?a=tiny&b=polite")
    page.get_by_label("Prompt", exact=True).fill(f"{MARKUP} {TURNED} שלום")
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_text("Both answers are there.")).to_be_visible()
    expect(page.locator("section > .said").filter(has_text=SHOWN)).to_have_count(2)
    expect(page.locator("section > .said").filter(has_text="⟨U+D83D⟩")).to_have_count(1)
    assert page.locator("main img, main script").count() == 0
    look_at(page, "ask-hostile-long")

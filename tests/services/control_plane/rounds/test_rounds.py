"""Tests that pausing, resuming and cancelling rounds reaches the job and the evaluations that are under way."""

import asyncio
import json
from typing import Any

import httpx
import psycopg
import pytest

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.store import Store
from services.control_plane.models import models
from services.control_plane.rounds import rounds
from services.control_plane.settings import Settings
from tests.services.control_plane.evaluations.conftest import POLICY, Engines, until
from tests.services.control_plane.http.test_documented_answers import check
from tests.services.control_plane.rounds.conftest import created, look, reached

pytestmark = pytest.mark.usefixtures("policy")


def wished(settings: Settings, job_id: str) -> str:
    """Returns the state that the user wants for the job: run, pause or cancel."""
    with psycopg.connect(settings.database_url) as connection:
        (desired,) = connection.execute("SELECT desired FROM jobs WHERE id = %s", (job_id,)).fetchone() or ("",)
    return str(desired)


def evaluation(api: httpx.Client, evaluation_id: str) -> str:
    return str(api.get(f"/x/evaluations/{evaluation_id}").json()["status"])


def test_a_pause_reaches_an_evaluation_and_nothing_begins_until_the_rounds_go_on(
    api: httpx.Client, engines: Engines
) -> None:
    engines.is_away = True
    made = created(api)
    first = reached(api, made["id"], 0, "evaluations")["quality"]
    route = "/x/rounds/{rounds_id}"
    paused = check("post", f"{route}/pause", api.post(f"/x/rounds/{made['id']}/pause"))
    assert (paused["status"], evaluation(api, first)) == ("paused", "paused")
    engines.is_away = False
    api.post(f"/x/evaluations/{first}/resume")  # the user may look at one stage alone
    until(lambda: evaluation(api, first) == "succeeded")
    assert len(look(api, made["id"])["rounds"]) == 1
    check("post", f"{route}/resume", api.post(f"/x/rounds/{made['id']}/resume"))
    reached(api, made["id"], 1, "job")
    api.post(f"/x/rounds/{made['id']}/cancel")


def test_a_pause_and_a_cancellation_reach_the_job(api: httpx.Client, settings: Settings) -> None:
    made = created(api)
    job_id = reached(api, made["id"], 1, "job")
    api.post(f"/x/rounds/{made['id']}/pause")
    assert wished(settings, job_id) == "pause"
    again = api.post(f"/x/rounds/{made['id']}/pause")
    assert again.json()["status"] == "paused"
    assert api.post(f"/x/rounds/{made['id']}/resume").json()["status"] == "running"
    assert wished(settings, job_id) == "run"
    cancelled = api.post(f"/x/rounds/{made['id']}/cancel").json()
    assert (cancelled["status"], cancelled["stage"]) == ("cancelled", None)
    assert wished(settings, job_id) == "cancel"


def test_a_job_that_the_user_paused_is_waited_for(api: httpx.Client, settings: Settings) -> None:
    made = created(api)
    job_id = reached(api, made["id"], 1, "job")
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        connection.execute("UPDATE jobs SET observed = 'paused', desired = 'pause' WHERE id = %s", (job_id,))
    assert until(lambda: look(api, made["id"])["waits_for"]) == f"the job {job_id}, which is paused"
    api.post(f"/x/rounds/{made['id']}/cancel")


@pytest.mark.parametrize("wish", ["pause", "cancel"])
def test_an_evaluation_that_has_just_ended_does_not_hinder_a_wish(
    api: httpx.Client, engines: Engines, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    async def refuse(*_: object) -> None:
        raise InvalidRequest("The evaluation has ended (succeeded).")

    engines.is_away = True
    made = created(api)
    first = reached(api, made["id"], 0, "evaluations")["quality"]
    with monkeypatch.context() as patch:
        patch.setattr(rounds.evaluations, wish, refuse)
        assert api.post(f"/x/rounds/{made['id']}/{wish}").status_code == 200
    api.post(f"/x/evaluations/{first}/cancel")
    api.post(f"/x/rounds/{made['id']}/cancel")


@pytest.mark.parametrize(
    "field", ["judge", "judge.reference", "evaluation.judge", "evaluation.judge.reference", "round"]
)
def test_a_model_that_rounds_need_stays_until_they_have_ended(
    api: httpx.Client, settings: Settings, engines: Engines, field: str
) -> None:
    engines.is_away = True
    name = f"ft:tiny:raydpo::{field.replace('.', '-')}"
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        columns, values = "id, project_id, source, root, job_id, num_outputs", "%s, 'proj_default', %s, 'tiny', %s, 0"
        row = (name, f"file:///nowhere/{field}", "ftjob-one")
        connection.execute(f"INSERT INTO models ({columns}) VALUES ({values})", row)
        asked = {"type": "model", "model": name}
        implicit = {"type": "implicit", "model": POLICY, "reference": name}
        judge = implicit if field.endswith("reference") else asked
        wholes: dict[str, Any] = {
            "judge": {"judge": judge},
            "evaluation": {"evaluation": {"judge": judge}},
            "round": {},
        }
        made = created(api, **wholes[field.partition(".")[0]])
        api.post(f"/x/rounds/{made['id']}/pause")
        for evaluation_id in (entry["id"] for entry in api.get("/x/evaluations").json()["data"]):
            api.post(f"/x/evaluations/{evaluation_id}/cancel")  # it needs the model as well
        if field == "round":
            more = json.dumps([{"number": 1, "model": name}])
            connection.execute("UPDATE rounds SET history = history || %s::jsonb WHERE id = %s", (more, made["id"]))
    refused = api.delete(f"/models/{name}")
    assert (refused.status_code, f"is used by the rounds {made['id']}" in refused.text) == (400, True), refused.text

    async def dropped() -> set[str]:
        store = Store(settings.database_url)
        try:
            async with store.begin() as session:
                return await models.withdraw_unused(session, [name])
        finally:
            await store.close()

    assert asyncio.run(dropped()) == set()
    api.post(f"/x/rounds/{made['id']}/cancel")
    assert asyncio.run(dropped()) == {name}


@pytest.mark.parametrize("wish", ["pause", "resume", "cancel"])
def test_rounds_that_have_ended_take_no_wish(api: httpx.Client, wish: str) -> None:
    made = created(api)
    api.post(f"/x/rounds/{made['id']}/cancel")
    refused = api.post(f"/x/rounds/{made['id']}/{wish}")
    assert (refused.status_code, "cancelled" in refused.json()["error"]["message"]) == (400, True)

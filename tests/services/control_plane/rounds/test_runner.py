"""Tests that rounds survive the death of a control plane and errors that nobody expected."""

import asyncio
import json
from datetime import timedelta

import httpx
import psycopg
import pytest

from services.control_plane.core import leases
from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import DEFAULT_PROJECT, Rounds
from services.control_plane.evaluations import work
from services.control_plane.ray_api import RayApi
from services.control_plane.rounds import runner, stages
from services.control_plane.rounds.runner import RoundsRunner
from services.control_plane.settings import Settings
from tests.services.control_plane.attempts.test_reconciler import reports, spool
from tests.services.control_plane.conftest import FakeRay, api_of, serving
from tests.services.control_plane.evaluations.conftest import POLICY, Engines, add_policy, chats, until
from tests.services.control_plane.rounds.conftest import created, ended, look, reached

pytestmark = pytest.mark.usefixtures("policy")


def unforeseen(*_: object) -> object:
    raise KeyError("unforeseen")


def test_an_unexpected_error_is_told_and_tried_again(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RETRY_SECONDS", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "rows_of", unforeseen)
        made = created(api)
        told = until(lambda: "KeyError" in (look(api, made["id"])["waits_for"] or "") and look(api, made["id"]))
        assert told["status"] == "running"
    reached(api, made["id"], 1, "job")
    assert look(api, made["id"])["waits_for"] is None
    api.post(f"/x/rounds/{made['id']}/cancel")


def test_errors_that_last_a_day_end_the_rounds(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(runner, "GIVEN_UP_AFTER", timedelta(seconds=0.1))
    monkeypatch.setattr(stages, "rows_of", unforeseen)
    found = ended(api, created(api)["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "rounds_stalled")


def test_rounds_that_were_deleted_need_no_work(settings: Settings, base_url: str) -> None:
    async def work() -> None:
        store = Store(settings.database_url)
        ray_api = RayApi(settings, store.instance)
        try:
            await RoundsRunner(store, settings, ray_api).work(Rounds(id="rounds-none", project_id=DEFAULT_PROJECT))
        finally:
            await ray_api.close()
            await store.close()

    asyncio.run(work())


def test_after_a_kill_the_rounds_go_on_and_repeat_no_stored_sample(
    settings: Settings, engines: Engines, fake_ray: FakeRay, postgres_url: str
) -> None:
    """The service that is killed, in each stage once, has a database of its own."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE rounds_killed")
    own = settings.model_copy(update={"database_url": postgres_url.replace("/postgres?", "/rounds_killed?")})
    migrate(own.database_url)
    add_policy(own)
    more = {"RAYDPO_MODELS": json.dumps({"tiny": "/nowhere/tiny"}), "RAYDPO_SERVE_URL": str(own.serve_url)}
    more |= {"RAYDPO_MAX_LOADED_MODELS": "10", "RAYDPO_RAY_URL": str(own.ray_url)}
    engines.delay = 0.1

    def sampled() -> int:
        return sum(body.get("n", 1) == 3 for _, body in list(engines.asked))

    with serving(own, **more) as (process, url), api_of(url, "rd-a-key-for-tests") as api:
        made = created(api, rows=chats(40), num_rounds=1)
        until(lambda: sampled() > 10)
        process.kill()
        process.wait()
    engines.delay = 0.0
    with psycopg.connect(own.database_url, autocommit=True) as connection:
        (stored,) = connection.execute("SELECT count(*) FROM evaluation_items WHERE found ? 'answers'").fetchone() or (
            0,
        )
        assert 0 < stored < 40
        connection.execute("UPDATE leases SET expires_at = now()")  # as after LEASE_SECONDS
    with serving(own, **more) as (process, url), api_of(url, "rd-a-key-for-tests") as api:
        job_id = reached(api, made["id"], 1, "job")
        assert sampled() <= 40 + 2 * work.ITEMS_AT_ONCE
        until(lambda: f"{job_id}-1" in fake_ray.jobs)
        process.kill()
        process.wait()
    spool(own, job_id, 1, reports(own, job_id))
    fake_ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    with psycopg.connect(own.database_url, autocommit=True) as connection:
        connection.execute("UPDATE leases SET expires_at = now()")
    with serving(own, **more) as (_, url), api_of(url, "rd-a-key-for-tests") as api:
        found = ended(api, made["id"])
        assert (found["status"], len(found["rounds"])) == ("succeeded", 2)
        assert len(api.get("/fine_tuning/jobs").json()["data"]) == 2  # that of the round, and that of the first policy
        assert len(api.get("/x/evaluations").json()["data"]) == 4
        assert found["rounds"][0]["model"] == POLICY

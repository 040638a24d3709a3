"""Tests that a sweep survives the death of a control plane, and that two of them double nothing."""

import asyncio
import json
from datetime import timedelta

import httpx
import psycopg
import pytest

from services.control_plane.core import leases
from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import DEFAULT_PROJECT, Sweep
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from services.control_plane.sweeps import runner, sweeps
from services.control_plane.sweeps.runner import SweepRunner
from tests.conftest import new_database
from tests.services.control_plane.conftest import API_KEY, FakeRay, api_of, pairs, serving
from tests.services.control_plane.evaluations.conftest import Engines, until
from tests.services.control_plane.sweeps.conftest import BETA, begun, body, created, ended, look, trials

pytestmark = pytest.mark.slow

NUM_TRIALS = 16


def test_after_kills_every_trial_has_exactly_one_job(
    offline: Settings, settings: Settings, fake_ray: FakeRay, engines: Engines, postgres_url: str
) -> None:
    """Two control planes advance the sweep; each is killed while it does so. A third one goes on."""
    own = settings.model_copy(update={"database_url": new_database(postgres_url)})
    migrate(own.database_url)
    with serving(own) as (first, url), serving(own) as (second, _), api_of(url, API_KEY) as api:
        sent = api.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"})
        sweep = body(sent.json()["id"], max_running_jobs=1)
        sweep["parameters"] = {BETA: {"values": [number / NUM_TRIALS for number in range(1, NUM_TRIALS + 1)]}}
        made = created(api, **sweep)
        with psycopg.connect(own.database_url, autocommit=True) as connection:
            until(lambda: _end_jobs(connection) >= 3)
            first.kill()
            until(lambda: _end_jobs(connection) >= 6)
            second.kill()
    with psycopg.connect(own.database_url, autocommit=True) as connection, serving(own) as (_, url):
        until(lambda: _end_jobs(connection) == NUM_TRIALS, seconds=300)
        with api_of(url, API_KEY) as api:
            # The last job may have come between the two statements that end and count jobs.
            until(lambda: _end_jobs(connection) and look(api, made["id"])["status"] != "running")
            found = trials(api, made["id"])
            jobs = connection.execute("SELECT id, spec FROM jobs").fetchall()
    assert sorted(job_id for job_id, _ in jobs) == sorted(trial["job_id"] for trial in found)
    betas = {job_id: spec["config"]["objective"]["beta"] for job_id, spec in jobs}
    assert {trial["id"]: betas[trial["job_id"]] for trial in found} == {
        str(number): (number + 1) / NUM_TRIALS for number in range(NUM_TRIALS)
    }


def unforeseen(*_: object) -> object:
    raise KeyError("unforeseen")


def test_an_unexpected_error_is_told_and_after_a_day_ends_the_sweep_and_its_jobs(
    api: httpx.Client, file_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RETRY_SECONDS", 0.2)
    made = created(api, **body(file_id))
    job_id = begun(api, made["id"], 0)["job_id"]
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "_stop_hopeless", unforeseen)
        until(lambda: "KeyError" in (look(api, made["id"])["waits_for"] or ""))
        assert look(api, made["id"])["status"] == "running"
    until(lambda: look(api, made["id"])["waits_for"] is None)
    monkeypatch.setattr(sweeps, "_stop_hopeless", unforeseen)
    monkeypatch.setattr(leases, "GIVEN_UP_AFTER", timedelta(seconds=0.1))
    found = ended(api, made["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "sweep_stalled")
    assert "Cancellation requested" in api.get(f"/fine_tuning/jobs/{job_id}/events").text


def test_a_sweep_that_waits_is_looked_at_less_and_less_often(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = iter(["A quota."] * 7 + [None, "A quota."])

    async def advance(*_: object) -> Sweep:
        return Sweep(state="running", waits_for=next(waits))

    async def rest(sweep_runner: SweepRunner) -> float:
        with pytest.raises(leases.Later) as later:
            await sweep_runner.work(Sweep(id="sweep-none", project_id=DEFAULT_PROJECT))
        return later.value.seconds

    async def rests() -> list[float]:
        store = Store(settings.database_url)
        ray_api = RayApi(settings, store.instance)
        sweep_runner = SweepRunner(store, settings, ray_api)
        try:
            return [await rest(sweep_runner) for _ in range(9)]
        finally:
            await ray_api.close()
            await store.close()

    monkeypatch.setattr(runner, "TICK_SECONDS", 1.0)
    monkeypatch.setattr(sweeps, "advance", advance)
    assert asyncio.run(rests()) == [1, 2, 4, 8, 16, 32, 60, 1, 1]


def _end_jobs(connection: psycopg.Connection[tuple[int]]) -> int:
    """Ends all jobs as failed, as the reconciler would, and returns how many jobs there are so far."""
    error = json.dumps({"code": "x", "message": "It failed.", "param": None})
    ends = "observed = 'failed', version = version + 1, finished_at = now(), error = %s"
    connection.execute(f"UPDATE jobs SET {ends} WHERE observed IN ('queued', 'running')", (error,))
    row = connection.execute("SELECT count(*) FROM jobs").fetchone()
    assert row is not None
    return row[0]

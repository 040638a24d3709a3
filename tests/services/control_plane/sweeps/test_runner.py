"""Tests that a sweep survives the death of a control plane, and that two of them double nothing."""

import json

import psycopg
import pytest

from services.control_plane.core.store import migrate
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, FakeRay, api_of, pairs, serving
from tests.services.control_plane.evaluations.conftest import Engines, until
from tests.services.control_plane.sweeps.conftest import BETA, body, created, look, trials

pytestmark = pytest.mark.slow

NUM_TRIALS = 16


def test_after_kills_every_trial_has_exactly_one_job(
    offline: Settings, settings: Settings, fake_ray: FakeRay, engines: Engines, postgres_url: str
) -> None:
    """Two control planes advance the sweep; each is killed while it does so. A third one goes on."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE killed_sweeps")
    own = settings.model_copy(update={"database_url": postgres_url.replace("/postgres?", "/killed_sweeps?")})
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
            until(lambda: look(api, made["id"])["status"] != "running")
            found = trials(api, made["id"])
            jobs = connection.execute("SELECT id, spec FROM jobs").fetchall()
    assert sorted(job_id for job_id, _ in jobs) == sorted(trial["job_id"] for trial in found)
    betas = {job_id: spec["config"]["objective"]["beta"] for job_id, spec in jobs}
    assert {trial["id"]: betas[trial["job_id"]] for trial in found} == {
        str(number): (number + 1) / NUM_TRIALS for number in range(NUM_TRIALS)
    }


def _end_jobs(connection: psycopg.Connection[tuple[int]]) -> int:
    """Ends all jobs as failed, as the reconciler would, and returns how many jobs there are so far."""
    error = json.dumps({"code": "x", "message": "It failed.", "param": None})
    ends = "observed = 'failed', version = version + 1, finished_at = now(), error = %s"
    connection.execute(f"UPDATE jobs SET {ends} WHERE observed IN ('queued', 'running')", (error,))
    row = connection.execute("SELECT count(*) FROM jobs").fetchone()
    assert row is not None
    return row[0]

"""Tests that the evaluations that jobs ask for are created once each, whatever dies meanwhile."""

from datetime import timedelta

import httpx
import psycopg
import pytest

from services.control_plane.core import leases
from services.control_plane.core.store import migrate
from services.control_plane.jobs.checkpoint_evaluations import checkpoint_evaluations
from services.control_plane.settings import Settings
from tests.conftest import new_database
from tests.services.control_plane.conftest import API_KEY, FakeRay, api_of, pairs, serving
from tests.services.control_plane.evaluations.conftest import Engines, until
from tests.services.control_plane.jobs.checkpoint_evaluations.conftest import (
    WORDS,
    all_ended,
    created,
    send,
    shown,
)
from tests.services.control_plane.sweeps.conftest import train

pytestmark = pytest.mark.slow

NUM_CHECKPOINTS, NAMES = 8, ("a", "b", "c")


def test_after_kills_every_checkpoint_has_exactly_one_evaluation_of_each_name(
    settings: Settings, fake_ray: FakeRay, engines: Engines, postgres_url: str
) -> None:
    """Two control planes create the evaluations; each is killed while it does so. A third one goes on."""
    own = settings.model_copy(update={"database_url": new_database(postgres_url)})
    migrate(own.database_url)
    expected = NUM_CHECKPOINTS * len(NAMES)

    def num_created(connection: psycopg.Connection[tuple[int]]) -> int:
        row = connection.execute("SELECT count(*) FROM evaluations").fetchone()
        assert row is not None
        return row[0]

    with (
        psycopg.connect(own.database_url, autocommit=True) as connection,
        serving(own) as (first, url),
        serving(own) as (second, _),
        api_of(url, API_KEY) as api,
    ):
        file = send(api, "pairs.jsonl", pairs())
        asked = {name: WORDS | {"file": file, "of": "checkpoints"} for name in NAMES}
        job_id = created(api, file, evaluations=asked, keep_checkpoints="all")
        train(own, fake_ray, job_id, [0.5] * NUM_CHECKPOINTS)
        until(lambda: num_created(connection) >= 3)
        first.kill()
        until(lambda: num_created(connection) >= 8)
        second.kill()
    with psycopg.connect(own.database_url, autocommit=True) as connection, serving(own):
        until(lambda: num_created(connection) >= expected)
        waiting = "SELECT count(*) FROM job_evaluations WHERE state = 'waiting'"
        until(lambda: connection.execute(waiting).fetchone() == (0,))
        rows = connection.execute("SELECT name, model_id, evaluation_id FROM job_evaluations").fetchall()
        made = dict(connection.execute("SELECT id, spec->>'model' FROM evaluations").fetchall())
    assert len(rows) == len({(name, model) for name, model, _ in rows}) == expected
    assert {evaluation_id: model for _, model, evaluation_id in rows} == made
    assert len(made) == expected


def unforeseen(*_: object) -> object:
    raise KeyError("unforeseen")


def test_an_unexpected_error_is_told_and_after_a_day_ends_the_evaluation(
    api: httpx.Client,
    settings: Settings,
    fake_ray: FakeRay,
    file_id: str,
    prompts: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leases, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(checkpoint_evaluations, "kind_of", unforeseen)
    job_id = created(api, file_id, evaluations={"words": WORDS | {"file": prompts}})
    train(settings, fake_ray, job_id, [0.5])
    until(lambda: any("KeyError" in (each["waits_for"] or "") for each in shown(api, job_id)))
    monkeypatch.setattr(leases, "GIVEN_UP_AFTER", timedelta(seconds=0.1))
    (found,) = all_ended(api, job_id, 1)
    assert (found["id"], found["status"], found["error"]["code"]) == (None, "failed", "evaluation_stalled")

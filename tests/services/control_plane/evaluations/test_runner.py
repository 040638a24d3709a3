"""Tests that evaluations survive the death of a control plane and of a model, and count as their key's usage."""

import json
import time

import httpx
import psycopg
import pytest

from services.control_plane.core import leases
from services.control_plane.core.store import migrate
from services.control_plane.evaluations import runner, work
from services.control_plane.settings import Settings
from tests.conftest import new_database
from tests.services.control_plane.conftest import EVERY_SCOPE, api_of, new_key, serving
from tests.services.control_plane.evaluations.conftest import POLICY, Engines, add_policy, chats, created, ended, until

COMPARE = {"kind": "compare", "model": POLICY, "judge": {"type": "model", "model": "fair"}, "rows": chats(6)}
SCORE = {"kind": "score", "model": "tiny", "judge": {"type": "length"}, "rows": chats(3)}
pytestmark = pytest.mark.usefixtures("policy")


def test_a_model_that_is_deleted_meanwhile_ends_the_evaluation(
    api: httpx.Client, settings: Settings, engines: Engines
) -> None:
    engines.is_away = True
    made = created(api, **COMPARE)
    until(lambda: api.get(f"/x/evaluations/{made['id']}").json()["waits_for"])
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        connection.execute("UPDATE models SET deleted_at = now()")
        try:
            connection.execute("UPDATE leases SET holder = 'x', expires_at = now() WHERE name LIKE 'evaluation %'")
            found = ended(api, made["id"])
        finally:
            connection.execute("UPDATE models SET deleted_at = NULL")
    assert (found["status"], found["error"]["code"]) == ("failed", "model_not_found")
    assert POLICY in found["error"]["message"]


def unreadable(*_: object) -> object:
    raise KeyError("unforeseen")


def test_an_unexpected_error_is_told_and_tried_again(
    api: httpx.Client, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RETRY_SECONDS", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "kind_of", unreadable)
        made = created(api, **SCORE)
        told = until(lambda: api.get(f"/x/evaluations/{made['id']}").json()["waits_for"])
        assert "because of an error of its own (KeyError)" in told
    found = ended(api, made["id"])
    assert (found["status"], found["num_completed"], found["waits_for"]) == ("succeeded", 3, None)


def test_an_error_that_lasts_a_day_ends_the_evaluation(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(work, "STALLED_SECONDS", 0.1)
    monkeypatch.setattr(runner, "kind_of", unreadable)
    found = ended(api, created(api, **SCORE)["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "evaluation_stalled")
    assert "(KeyError)" in found["error"]["message"]


def test_a_key_with_a_limit_of_tokens_does_not_exceed_it(
    api: httpx.Client, base_url: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_key(api, scopes=EVERY_SCOPE, tokens_per_minute=150)
    with api_of(base_url, key["value"]) as own:
        made = created(own, **SCORE | {"rows": chats(60)})
        waits_for = until(lambda: own.get(f"/x/evaluations/{made['id']}").json()["waits_for"])
        assert "150 tokens per minute" in waits_for
        assert len(engines.asked) < 25  # an answer takes 15 tokens, and eight are asked for at once
        own.post(f"/x/evaluations/{made['id']}/cancel")


def test_after_a_kill_the_work_goes_on_where_it_was_and_nothing_is_repeated(
    offline: Settings, settings: Settings, engines: Engines, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service that is killed has a database of its own, so that the one of the other tests takes nothing."""
    own = settings.model_copy(update={"database_url": new_database(postgres_url)})
    migrate(own.database_url)
    add_policy(own)
    models = {name: f"/nowhere/{name}" for name in ("tiny", "fair", "first")}
    more = {"RAYDPO_MODELS": json.dumps(models), "RAYDPO_SERVE_URL": str(own.serve_url)}
    more |= {"RAYDPO_MAX_LOADED_MODELS": "10"}
    rows, engines.delay = chats(60), 0.1
    with serving(own, **more) as (process, url), api_of(url, "rd-a-key-for-tests") as api:
        made = created(api, **COMPARE | {"rows": rows})
        until(lambda: api.get(f"/x/evaluations/{made['id']}").json()["progress"] > 0.1)
        process.kill()
        process.wait()
    engines.delay = 0.0
    time.sleep(0.2)  # requests that were on their way
    asked_before = [(model, json.dumps(body)) for model, body in engines.asked]
    with psycopg.connect(own.database_url, autocommit=True) as connection:
        stored = connection.execute("SELECT sum(stage) FROM evaluation_items").fetchone()
        counted = connection.execute("SELECT num_stages_done FROM evaluations").fetchone()
        assert stored == counted
        assert stored is not None
        assert 0 < stored[0] < 180
        connection.execute("UPDATE leases SET expires_at = now()")  # as after LEASE_SECONDS
    with serving(own, **more) as (_, url), api_of(url, "rd-a-key-for-tests") as api:
        found = ended(api, made["id"])
    assert (found["status"], found["num_completed"], found["results"]["num_wins"]) == ("succeeded", 60, 60)
    repeated = len(engines.asked) - 60 * 4
    assert 0 <= repeated <= 2 * work.ITEMS_AT_ONCE  # those whose answers the dead one had not stored
    assert len(asked_before) < len(engines.asked)

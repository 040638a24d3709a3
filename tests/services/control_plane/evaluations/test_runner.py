"""Tests that evaluations go on after failures, lose nothing and repeat nothing, on a real database."""

import asyncio
import json
import time
from collections.abc import Callable

import httpx
import psycopg
import pytest

from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import Evaluation
from services.control_plane.evaluations import evaluations, work
from services.control_plane.evaluations.evaluations import Ended
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import EVERY_SCOPE, api_of, new_key, serving
from tests.services.control_plane.evaluations.conftest import POLICY, Engines, add_policy, chats, created, ended

COMPARE = {"kind": "compare", "model": POLICY, "judge": {"type": "model", "model": "fair"}, "rows": chats(6)}
SCORE = {"kind": "score", "model": "tiny", "judge": {"type": "length"}, "rows": chats(3)}
pytestmark = pytest.mark.usefixtures("policy")


def until(holds: Callable[[], object], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_model_that_fails_is_asked_again_and_the_evaluation_succeeds(api: httpx.Client, engines: Engines) -> None:
    engines.failing[POLICY] = 8
    found = ended(api, created(api, **COMPARE)["id"])
    assert (found["status"], found["num_completed"], found["num_failed"]) == ("succeeded", 6, 0)
    assert engines.counts()[POLICY] == 6 + 8


def test_an_item_that_is_refused_fails_at_once_and_is_left_out_of_the_results(
    api: httpx.Client, engines: Engines
) -> None:
    engines.refusing.add("Question 2")
    found = ended(api, created(api, **COMPARE)["id"])
    assert (found["status"], found["num_completed"], found["num_failed"]) == ("succeeded", 5, 1)
    assert (found["progress"], found["results"]["num_wins"]) == (1, 5)
    items = api.get(f"/x/evaluations/{found['id']}/items").json()["data"]
    assert [item["status"] for item in items] == ["completed"] * 2 + ["failed"] + ["completed"] * 3
    assert items[2]["error"] == {"code": "invalid_value", "message": "I do not take this."}
    assert engines.counts()[POLICY] == 6


def test_an_evaluation_whose_items_all_fail_says_why(api: httpx.Client, engines: Engines) -> None:
    engines.failing["tiny"] = 1000
    found = ended(api, created(api, **SCORE)["id"])
    assert (found["status"], found["num_failed"], found["results"]) == ("failed", 3, None)
    assert found["error"]["code"] == "evaluation_failed"
    assert found["error"]["message"] == "All items failed. The first one: The model 'tiny' failed: out of luck"
    assert engines.counts()["tiny"] == 3 * work.MOST_TRIES


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


def test_it_waits_for_models_as_long_as_it_takes_and_says_so(api: httpx.Client, engines: Engines) -> None:
    engines.is_away = True
    made = created(api, **COMPARE)
    until(lambda: len(engines.asked) > 3 * work.MOST_TRIES)
    told = api.get(f"/x/evaluations/{made['id']}").json()
    assert "The engine has died" in told["waits_for"]
    assert (told["status"], told["num_failed"]) == ("running", 0)
    engines.is_away = False
    found = ended(api, made["id"])
    assert (found["status"], found["num_completed"], found["waits_for"]) == ("succeeded", 6, None)


def test_items_fail_if_nothing_was_finished_for_a_day(
    api: httpx.Client, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "STALLED_SECONDS", 0.3)
    engines.is_away = True
    found = ended(api, created(api, **SCORE)["id"])
    assert (found["status"], found["num_failed"]) == ("failed", 3)
    assert "The engine has died" in found["error"]["message"]
    items = api.get(f"/x/evaluations/{found['id']}/items").json()["data"]
    assert {item["error"]["code"] for item in items} == {"evaluation_stalled"}


def test_a_key_with_a_limit_of_tokens_does_not_exceed_it(
    api: httpx.Client, base_url: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_key(api, scopes=EVERY_SCOPE, tokens_per_minute=150)
    with api_of(base_url, key["value"]) as own:
        made = created(own, **SCORE | {"rows": chats(60)})
        until(lambda: own.get(f"/x/evaluations/{made['id']}").json()["waits_for"])
        told = own.get(f"/x/evaluations/{made['id']}").json()
        assert "150 tokens per minute" in told["waits_for"]
        assert len(engines.asked) < 25  # an answer takes 15 tokens, and eight are asked for at once
        own.post(f"/x/evaluations/{made['id']}/cancel")


def test_of_each_project_only_the_oldest_evaluations_are_claimed_and_projects_take_turns(
    api: httpx.Client, postgres_url: str
) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE claims")
    url = postgres_url.replace("/postgres?", "/claims?")
    migrate(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("INSERT INTO projects (id, name) VALUES ('proj_b', 'b')")
        for number, project in enumerate(["proj_default", "proj_default", "proj_default", "proj_b"]):
            columns = "id, project_id, key_id, spec, state, num_items, num_stages"
            connection.execute(
                f"INSERT INTO evaluations ({columns}, num_stages_done, num_completed, num_failed)"
                " VALUES (%s, %s, 'key', '{}', 'queued', 1, 1, 0, 0, 0)",
                (str(number), project),
            )

    async def claimed() -> list[str | None]:
        store = Store(url)
        try:
            found = []
            for _ in range(5):
                async with store.begin() as session:
                    claimed = await evaluations.claim(session, "test", most=2, seconds=60)
                    found.append(claimed and claimed.id)
            return found
        finally:
            await store.close()

    assert asyncio.run(claimed()) == ["0", "3", "1", None, None]


def test_a_stage_is_stored_once_and_not_after_the_end(api: httpx.Client, database_url: str, engines: Engines) -> None:
    engines.delay = 30  # nobody else finishes a stage
    made = created(api, **SCORE | {"rows": chats(2)})

    async def twice() -> tuple[int, list[str]]:
        store, outcomes = Store(database_url), []
        try:
            async with store.begin() as session:
                evaluation = await evaluations.find(session, made["id"])
                item = (await evaluations.next_items(session, evaluation, [], 1))[0]
            for _ in range(2):
                try:
                    async with store.begin() as session:
                        await evaluations.store_stage(session, evaluation, item, {"answer": "a"})
                    outcomes.append("stored")
                except Ended:
                    outcomes.append("ended")
            async with store.begin() as session:
                await evaluations.cancel(session, made["id"])
            async with store.begin() as session:
                item = (await evaluations.next_items(session, evaluation, [], 1))[0]
            try:
                async with store.begin() as session:
                    await evaluations.store_stage(session, evaluation, item, {"answer": "a"})
            except Ended:
                outcomes.append("ended")
            async with store.begin() as session:
                return (await session.get_one(Evaluation, made["id"])).num_stages_done, outcomes
        finally:
            await store.close()

    until(lambda: api.get(f"/x/evaluations/{made['id']}").json()["status"] == "running")
    assert asyncio.run(twice()) == (1, ["stored", "ended", "ended"])
    engines.delay = 0


def test_after_a_kill_the_work_goes_on_where_it_was_and_nothing_is_repeated(
    offline: Settings, settings: Settings, engines: Engines, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service that is killed has a database of its own, so that the one of the other tests takes nothing."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE killed")
    own = settings.model_copy(update={"database_url": postgres_url.replace("/postgres?", "/killed?")})
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

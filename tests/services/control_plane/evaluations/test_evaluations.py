"""Tests how evaluations are claimed and changed in a real database: nothing counts twice."""

import asyncio

import httpx
import psycopg
import pytest

from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import Evaluation
from services.control_plane.evaluations import evaluations
from services.control_plane.evaluations.evaluations import Ended
from services.control_plane.models import models
from services.control_plane.settings import Settings
from tests.conftest import new_database
from tests.services.control_plane.conftest import EVERY_SCOPE, api_of, new_key, new_project
from tests.services.control_plane.evaluations.conftest import Engines, chats, created, until

SCORE = {"kind": "score", "model": "tiny", "judge": {"type": "length"}, "rows": chats(3)}


def test_of_each_project_only_the_oldest_evaluations_are_claimed_and_projects_take_turns(
    api: httpx.Client, postgres_url: str
) -> None:
    url = new_database(postgres_url)
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
                    claimed = await evaluations.claim(session, "test", most=2)
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


@pytest.mark.parametrize("field", ["model", "baseline", "judge", "judge.reference"])
def test_a_model_that_an_evaluation_needs_stays_until_the_evaluation_has_ended(
    api: httpx.Client, settings: Settings, policy: str, engines: Engines, field: str
) -> None:
    engines.is_away = True
    name = f"ft:tiny:raydpo::{field}"
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        columns, values = "id, project_id, source, root, job_id, num_outputs", "%s, 'proj_default', %s, 'tiny', %s, 0"
        row = (name, f"file:///nowhere/{field}", "ftjob-one")
        connection.execute(f"INSERT INTO models ({columns}) VALUES ({values})", row)

    async def dropped() -> set[str]:
        store = Store(settings.database_url)
        try:
            async with store.begin() as session:
                return await models.withdraw_unused(session, [name])
        finally:
            await store.close()

    implicit = {"type": "implicit", "model": policy, "reference": name}
    judges = {"judge": {"type": "model", "model": name}, "judge.reference": implicit}
    judge = judges.get(field, {"type": "length"})
    named = {} if field in judges else {field: name}
    made = created(api, **{"kind": "compare", "model": policy, "judge": judge, "rows": chats(1)} | named)
    refused = api.delete(f"/models/{name}")
    assert refused.status_code == 400
    assert f"is used by the evaluation {made['id']}, still under way" in refused.json()["error"]["message"]
    assert asyncio.run(dropped()) == set()
    api.post(f"/x/evaluations/{made['id']}/cancel").raise_for_status()
    api.delete(f"/models/{name}").raise_for_status()
    gone = api.post("/x/evaluations", json={"kind": "drift", "model": name, "rows": chats(1)})
    assert gone.json()["error"]["code"] == "model_not_found"


def test_a_project_is_archived_only_when_its_evaluations_have_ended(
    api: httpx.Client, base_url: str, engines: Engines
) -> None:
    engines.is_away = True
    project = new_project(api, "leaving")
    with api_of(base_url, new_key(api, project_id=project, scopes=EVERY_SCOPE)["value"]) as leaving:
        made = created(leaving, **SCORE)
        refused = api.post(f"/x/projects/{project}/archive")
        assert (refused.status_code, "1 evaluations that have not ended" in refused.text) == (400, True)
        leaving.post(f"/x/evaluations/{made['id']}/cancel")
    assert api.post(f"/x/projects/{project}/archive").status_code == 200


def test_the_end_of_an_evaluation_is_told_to_the_webhooks_that_asked_once(
    api: httpx.Client, settings: Settings, engines: Engines
) -> None:
    types = ["eval.run.succeeded", "eval.run.canceled"]
    hook = {"name": "ends", "url": "https://localhost:9/", "event_types": types}  # nobody answers there
    answer = api.post("/webhook_endpoints", json=hook)
    assert answer.status_code == 200, answer.text
    done = created(api, **SCORE)
    until(lambda: api.get(f"/x/evaluations/{done['id']}").json()["status"] == "succeeded")
    engines.is_away = True
    stopped = created(api, **SCORE)
    for _ in range(2):
        api.post(f"/x/evaluations/{stopped['id']}/cancel")
    query = "SELECT body ->> 'type', body -> 'data' ->> 'id' FROM outbox WHERE endpoint_id = %s ORDER BY due_at"
    with psycopg.connect(settings.database_url) as connection:
        told = connection.execute(query, (answer.json()["id"],)).fetchall()
    assert sorted(told) == sorted(zip(types, (done["id"], stopped["id"]), strict=True))
    api.delete(f"/webhook_endpoints/{answer.json()['id']}")

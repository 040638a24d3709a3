"""Tests that rounds survive the death of a control plane and errors that nobody expected."""

import asyncio
import json
from datetime import timedelta

import httpx
import psycopg
import pytest

from services.control_plane.core import leases
from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import DEFAULT_PROJECT, Project, Rounds
from services.control_plane.evaluations import work
from services.control_plane.ray_api import RayApi
from services.control_plane.rounds import rounds, runner, stages
from services.control_plane.rounds.runner import RoundsRunner
from services.control_plane.rounds.stages import Refused, Stages
from services.control_plane.settings import Settings
from tests.conftest import new_database
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
        patch.setattr(stages, "write_rows", unforeseen)
        made = created(api)
        told = until(lambda: "KeyError" in (look(api, made["id"])["waits_for"] or "") and look(api, made["id"]))
        assert told["status"] == "running"
    reached(api, made["id"], 1, "job")
    assert look(api, made["id"])["waits_for"] is None
    api.post(f"/x/rounds/{made['id']}/cancel")


def test_errors_that_last_a_day_end_the_rounds(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(leases, "GIVEN_UP_AFTER", timedelta(seconds=0.1))
    monkeypatch.setattr(stages, "write_rows", unforeseen)
    found = ended(api, created(api)["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "rounds_stalled")


@pytest.mark.parametrize("reason", ["waits", "resumed"])
def test_a_wait_or_a_resumption_ends_the_trouble(
    api: httpx.Client, settings: Settings, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr("services.control_plane.evaluations.evaluations.MOST_LIVE", 0)
    made = created(api)
    with psycopg.connect(settings.database_url, autocommit=True) as connection:

        def is_troubled() -> bool:
            row = connection.execute("SELECT troubled_at FROM rounds WHERE id = %s", (made["id"],)).fetchone()
            return row is not None and row[0] is not None

        if reason == "resumed":
            api.post(f"/x/rounds/{made['id']}/pause")
            connection.execute("UPDATE rounds SET troubled_at = now() WHERE id = %s", (made["id"],))
            api.post(f"/x/rounds/{made['id']}/resume")
            assert not is_troubled()
        else:
            connection.execute("UPDATE rounds SET troubled_at = now() WHERE id = %s", (made["id"],))
            until(lambda: not is_troubled())
    api.post(f"/x/rounds/{made['id']}/cancel")


def test_rounds_that_wait_give_their_place_to_others(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundsRunner, "at_once", 1)
    made = [created(api) for _ in range(2)]
    for each in made:
        reached(api, each["id"], 1, "job")  # for whose end they wait
    for each in made:
        api.post(f"/x/rounds/{each['id']}/cancel")


def test_refusals_in_a_row_are_tried_again_later_and_later(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([*[Refused] * 7, None, Refused])

    async def step(_: Stages) -> bool:
        if found := next(steps):
            raise found
        return True

    async def rest(runner: RoundsRunner) -> float:
        with pytest.raises(leases.Later) as later:
            await runner.work(Rounds(id="rounds-none", project_id=DEFAULT_PROJECT))
        return later.value.seconds

    async def rests() -> list[float]:
        store = Store(settings.database_url)
        ray_api = RayApi(settings, store.instance)
        rounds_runner = RoundsRunner(store, settings, ray_api)
        try:
            return [await rest(rounds_runner) for _ in range(8)]
        finally:
            await ray_api.close()
            await store.close()

    monkeypatch.setattr(runner, "LOOK_SECONDS", 2.0)
    monkeypatch.setattr(Stages, "step", step)
    assert asyncio.run(rests()) == [2, 4, 8, 16, 32, 60, 60, 2]


def test_projects_take_turns(postgres_url: str) -> None:
    url = new_database(postgres_url)  # in which no control plane works
    migrate(url)

    async def claimed() -> list[str]:
        store = Store(url)
        try:
            for project in ("proj_a", "proj_b"):
                async with store.begin() as session:
                    session.add(Project(id=project, name=project))
                for number in range(2):
                    async with store.begin_for(project) as session:
                        spec: dict[str, object] = {}
                        name = f"{project}-{number}"
                        session.add(
                            Rounds(id=name, key_id="key", spec=spec, prompts={}, history=[], project_id=project)
                        )
            async with store.begin() as session:
                found = [await rounds.claim(session, "one") for _ in range(5)]
            return [each.id for each in found if each is not None]
        finally:
            await store.close()

    assert asyncio.run(claimed()) == ["proj_a-0", "proj_b-0", "proj_a-1", "proj_b-1"]


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
    own = settings.model_copy(update={"database_url": new_database(postgres_url)})
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

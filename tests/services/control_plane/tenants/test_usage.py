"""Tests usage: added up in memory, written in batches that count once, and shown by project, key, model and day."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import httpx
import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from services.control_plane.core.store import Store, migrate
from services.control_plane.settings import Settings
from services.control_plane.tenants import usage
from services.control_plane.tenants.usage import UsageRecorder
from tests.services.control_plane.conftest import EVERY_SCOPE, api_of, new_key, new_project

SUMS = ("num_requests", "prompt_tokens", "completion_tokens", "accelerator_seconds")


@pytest.fixture
def empty(settings: Settings) -> None:
    migrate(settings.database_url)
    with psycopg.connect(settings.database_url) as rows:
        rows.execute("DELETE FROM usage")
        rows.execute("DELETE FROM usage_writers")


def written(settings: Settings) -> list[tuple[object, ...]]:
    with psycopg.connect(settings.database_url) as rows:
        return rows.execute(f"SELECT key_id, {', '.join(SUMS)} FROM usage ORDER BY key_id").fetchall()


@asynccontextmanager
async def recorder_of(settings: Settings) -> AsyncIterator[UsageRecorder]:
    store = Store(settings.database_url)
    try:
        yield UsageRecorder(store)
    finally:
        await store.close()


def add(recorder: UsageRecorder, key_id: str, prompt: int, completion: int) -> None:
    recorder.add(
        "proj_default", key_id, "tiny", prompt_tokens=prompt, completion_tokens=completion, accelerator_seconds=0.5
    )


def test_answers_are_added_up_and_written_together(empty: None, settings: Settings) -> None:
    async def use() -> None:
        async with recorder_of(settings) as recorder:
            add(recorder, "a", 10, 1)
            add(recorder, "a", 20, 2)
            add(recorder, "b", 5, 5)
            await recorder.flush()
            add(recorder, "a", 1, 1)
            await recorder.flush()
            await recorder.flush()

    asyncio.run(use())
    assert written(settings) == [("a", 3, 31, 4, 1.5), ("b", 1, 5, 5, 0.5)]


@pytest.mark.parametrize("arrived", [True, False], ids=["written, and not confirmed", "not written"])
def test_a_batch_counts_once_whatever_became_of_its_first_writing(
    empty: None, settings: Settings, monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    async def use() -> None:
        async with recorder_of(settings) as recorder:
            begin = recorder._store.begin

            @asynccontextmanager
            async def breaking() -> AsyncIterator[object]:
                async with begin() as session:
                    yield session
                    if not arrived:
                        raise OperationalError("insert", {}, Exception("the server has gone"))
                raise OperationalError("commit", {}, Exception("the answer was lost"))

            add(recorder, "a", 10, 1)
            with monkeypatch.context() as patch:
                patch.setattr(recorder._store, "begin", breaking)
                await recorder.flush()
            add(recorder, "a", 20, 2)  # belongs to the next batch
            await recorder.flush()
            assert written(settings) == [("a", 1, 10, 1, 0.5)]
            await recorder.flush()

    asyncio.run(use())
    assert written(settings) == [("a", 2, 30, 3, 1.0)]


def test_what_was_added_is_written_when_the_process_ends(
    empty: None, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use() -> None:
        async with recorder_of(settings) as recorder:
            running = asyncio.create_task(recorder.run())
            await asyncio.sleep(0)
            add(recorder, "a", 10, 1)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(use())
    assert written(settings) == [("a", 1, 10, 1, 0.5)]


def test_control_planes_write_side_by_side(empty: None, settings: Settings) -> None:
    async def use() -> None:
        async with recorder_of(settings) as one, recorder_of(settings) as other:
            for _ in range(20):
                for recorder in (one, other):
                    for key in ("b", "a") if recorder is one else ("a", "b"):
                        add(recorder, key, 1, 1)
                await asyncio.gather(one.flush(), other.flush())

    asyncio.run(use())
    assert written(settings) == [("a", 40, 40, 40, 20.0), ("b", 40, 40, 40, 20.0)]


# --- the route ---------------------------------------------------------------------------------


@pytest.fixture
def rows(empty: None, base_url: str, api: httpx.Client, settings: Settings) -> str:
    """Adds three days of usage of two projects, and returns the id of the second."""
    project = new_project(api, f"other {datetime.now(UTC).timestamp()}")
    today = datetime.now(UTC).date()
    with psycopg.connect(settings.database_url) as connection:
        for owner, key, model, age in (
            ("proj_default", "key_1", "tiny", 0),
            ("proj_default", "key_1", "ft:a", 1),
            ("proj_default", "key_2", "tiny", 1),
            (project, "key_3", "tiny", 40),
            (project, "key_3", "tiny", 0),
        ):
            columns = f"project_id, key_id, model_id, day, {', '.join(SUMS)}"
            row = (owner, key, model, today - timedelta(days=age), 1, 10, 2, 0.25)
            connection.execute(f"INSERT INTO usage ({columns}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s)", row)
    return project


def sums(answer: httpx.Response) -> dict[str, tuple[float, ...]]:
    assert answer.status_code == 200, answer.text
    return {each["id"]: tuple(each[name] for name in SUMS) for each in answer.json()["data"]}


def test_usage_is_told_by_what_is_asked_for(rows: str, api: httpx.Client) -> None:
    today = datetime.now(UTC).date()
    yesterday = str(today - timedelta(days=1))
    assert sums(api.get("/x/usage?group_by=day")) == {yesterday: (2, 20, 4, 0.5), str(today): (2, 20, 4, 0.5)}
    assert sums(api.get("/x/usage?group_by=model")) == {"ft:a": (1, 10, 2, 0.25), "tiny": (3, 30, 6, 0.75)}
    assert sums(api.get("/x/usage?group_by=key"))["key_1"] == (2, 20, 4, 0.5)
    assert sums(api.get("/x/usage"))[rows] == (1, 10, 2, 0.25)
    long_ago = today - timedelta(days=60)
    assert sums(api.get(f"/x/usage?group_by=project&from={long_ago}&to={today}"))[rows] == (2, 20, 4, 0.5)
    assert sums(api.get(f"/x/usage?group_by=key&project_id={rows}")) == {"key_3": (1, 10, 2, 0.25)}
    assert sums(api.get(f"/x/usage?group_by=day&to={yesterday}")) == {yesterday: (2, 20, 4, 0.5)}


def test_usage_is_paged(rows: str, api: httpx.Client) -> None:
    first = api.get("/x/usage?group_by=key&limit=2").json()
    assert ([each["id"] for each in first["data"]], first["has_more"]) == (["key_1", "key_2"], True)
    rest = api.get(f"/x/usage?group_by=key&limit=2&after={first['last_id']}").json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (["key_3"], False)
    assert api.get("/x/usage?group_by=key&after=key_0").json()["error"]["param"] == "after"


def test_an_admin_of_a_project_sees_its_own_usage_and_others_see_none(
    rows: str, api: httpx.Client, base_url: str
) -> None:
    with api_of(base_url, new_key(api, project_id=rows, scopes=EVERY_SCOPE)["value"]) as theirs:
        assert set(sums(theirs.get("/x/usage?group_by=project"))) == {rows}
        assert sums(theirs.get("/x/usage?project_id=proj_default")) == {}
    with api_of(base_url, new_key(api, scopes=["read", "write", "inference"])["value"]) as own:
        assert own.get("/x/usage").json()["error"]["code"] == "missing_scope"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=2026-02-02&to=2026-02-01", "from"),
        ("from=yesterday", "from"),
        ("group_by=hour", "group_by"),
        ("a=1", "a"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(api: httpx.Client, query: str, param: str) -> None:
    answer = api.get(f"/x/usage?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_first_days_of_the_calendar_can_be_asked_for(api: httpx.Client) -> None:
    assert api.get("/x/usage?to=0001-01-05").json()["data"] == []


def test_old_numbers_of_batches_are_forgotten(empty: None, settings: Settings) -> None:
    async def use() -> None:
        async with recorder_of(settings) as recorder:
            add(recorder, "a", 1, 1)
            await recorder.flush()
            async with recorder._store.begin() as session:
                await usage.forget_writers(session)

    def numbers() -> int:
        with psycopg.connect(settings.database_url) as rows:
            return len(rows.execute("SELECT 1 FROM usage_writers").fetchall())

    asyncio.run(use())
    assert numbers() == 1
    with psycopg.connect(settings.database_url) as rows:
        rows.execute("UPDATE usage_writers SET written_at = now() - interval '2 days'")
    asyncio.run(use())
    assert numbers() == 1  # that of the second process

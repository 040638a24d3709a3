"""Tests usage: added up in memory, and written in batches that count once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from services.control_plane.core.store import Store, migrate
from services.control_plane.settings import Settings
from services.control_plane.tenants import usage
from services.control_plane.tenants.usage import UsageRecorder

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

"""Tests that look-ups at the same moment share one call, and that a later one sees everything written before it."""

import asyncio
from collections.abc import Mapping

import pytest

from services.control_plane.core.batching import Batcher


def test_keys_that_wait_share_one_call_and_later_ones_get_the_next() -> None:
    calls: list[list[str]] = []

    async def look() -> None:
        is_free = asyncio.Event()

        async def find(keys: list[str]) -> Mapping[str, int]:
            calls.append(keys)
            await is_free.wait()
            return {key: len(calls) for key in keys if key != "none"}

        batcher = Batcher(find)
        first = [asyncio.create_task(batcher.get(key)) for key in ("a", "b", "a", "none")]
        await asyncio.sleep(0.01)
        second = asyncio.create_task(batcher.get("a"))
        await asyncio.sleep(0.01)
        is_free.set()
        assert await asyncio.gather(*first) == [1, 1, 1, None]
        assert await second == 2

    asyncio.run(look())
    assert calls == [["a", "b", "none"], ["a"]]


def test_an_error_reaches_all_who_wait_and_nobody_after_them() -> None:
    async def look() -> None:
        fails = [True]

        async def find(keys: list[str]) -> Mapping[str, str]:
            if fails.pop():
                raise OSError("away")
            return dict.fromkeys(keys, "found")

        batcher = Batcher(find)
        for answer in await asyncio.gather(batcher.get("a"), batcher.get("b"), return_exceptions=True):
            assert isinstance(answer, OSError)
        fails.append(False)
        assert await batcher.get("a") == "found"

    asyncio.run(look())


def test_a_caller_that_leaves_takes_the_answer_from_nobody() -> None:
    async def look() -> None:
        async def find(keys: list[str]) -> Mapping[str, str]:
            await asyncio.sleep(0.01)
            return dict.fromkeys(keys, "found")

        batcher = Batcher(find)
        leaving, staying = (asyncio.create_task(batcher.get("a")) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await staying == "found"

    asyncio.run(look())

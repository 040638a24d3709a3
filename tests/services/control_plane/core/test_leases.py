"""Tests that work under a lease is done by one control plane at a time, and goes on after errors and deaths."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core import leases
from services.control_plane.core.leases import NOBODY, Later, Leaseholder, take
from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import Lease


class Pieces:
    """A kind of work whose pieces are texts. `act` does the work on a piece."""

    at_once = 2

    def __init__(self, *pieces: str, act: Callable[[str], Awaitable[None]]) -> None:
        self.left, self._act = list(pieces), act
        self.wanted = True
        self.errors: list[str] = []

    def lease_of(self, piece: str) -> str:
        return f"piece {piece}"

    async def claim(self, session: AsyncSession, holder: str) -> str | None:
        for piece in self.left:
            if await take(session, self.lease_of(piece), holder):
                self.left.remove(piece)
                return piece
        return None

    async def work(self, piece: str) -> None:
        await self._act(piece)

    async def goes_on(self, session: AsyncSession, piece: str) -> bool:
        return self.wanted

    async def interrupted(self, session: AsyncSession, piece: str, error: Exception) -> None:
        self.errors.append(f"{piece}: {error!r}")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.02)


def run(database_url: str, test: Callable[[Store], Awaitable[None]]) -> None:
    migrate(database_url)

    async def opened() -> None:
        store = Store(database_url)
        try:
            await test(store)
        finally:
            await store.close()

    asyncio.run(opened())


async def holder_of(store: Store, name: str) -> str | None:
    async with store.begin() as session:
        return await session.scalar(select(Lease.holder).where(Lease.name == name))


def test_a_piece_that_is_done_has_no_lease_any_more_and_one_under_way_is_taken_by_nobody_else(
    database_url: str,
) -> None:
    async def test(store: Store) -> None:
        begun, end = asyncio.Event(), asyncio.Event()

        async def wait(piece: str) -> None:
            begun.set()
            await end.wait()

        pieces = Pieces("a", act=wait)
        task = asyncio.create_task(Leaseholder(store, pieces, holder="one").run_once())
        await begun.wait()
        async with store.begin() as session:
            assert not await take(session, "piece a", "two")
        end.set()
        await task
        assert await holder_of(store, "piece a") is None

    run(database_url, test)


def test_an_unexpected_error_is_told_and_the_piece_is_held_back(database_url: str) -> None:
    async def test(store: Store) -> None:
        async def fail(piece: str) -> None:
            raise KeyError("unforeseen")

        pieces = Pieces("b", act=fail)
        await Leaseholder(store, pieces, holder="one").run_once()
        assert pieces.errors == ["b: KeyError('unforeseen')"]
        assert await holder_of(store, "piece b") == NOBODY

    run(database_url, test)


def test_work_that_has_to_wait_gives_its_place_to_others_and_is_held_back(database_url: str) -> None:
    async def test(store: Store) -> None:
        done: list[str] = []

        async def wait(piece: str) -> None:
            done.append(piece)
            raise Later(60)

        pieces = Pieces("g", "h", "i", act=wait)
        task = asyncio.create_task(Leaseholder(store, pieces, holder="one").run())
        while len(done) < 3:  # noqa: ASYNC110 - the other task adds to it
            await asyncio.sleep(0.01)
        while [await holder_of(store, f"piece {piece}") for piece in "ghi"] != [NOBODY] * 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert pieces.errors == []

    run(database_url, test)


def test_work_that_is_not_wanted_any_more_is_cancelled(database_url: str) -> None:
    async def test(store: Store) -> None:
        async def wait(piece: str) -> None:
            pieces.wanted = False
            await asyncio.Event().wait()

        pieces = Pieces("c", act=wait)
        await asyncio.wait_for(Leaseholder(store, pieces, holder="one").run_once(), 60)
        assert (pieces.errors, await holder_of(store, "piece c")) == ([], None)

    run(database_url, test)


def test_only_so_many_pieces_are_under_way_and_all_are_cancelled_at_the_end(database_url: str) -> None:
    async def test(store: Store) -> None:
        under_way: list[str] = []

        async def wait(piece: str) -> None:
            under_way.append(piece)
            try:
                await asyncio.Event().wait()
            finally:
                under_way.remove(piece)

        pieces = Pieces("d", "e", "f", act=wait)
        task = asyncio.create_task(Leaseholder(store, pieces, holder="one").run())
        while len(under_way) < 2:  # noqa: ASYNC110 - the other task sets it
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert under_way == ["d", "e"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert under_way == []
        assert await holder_of(store, "piece d") is None

    run(database_url, test)


def test_rests_double_up_to_a_limit_until_they_are_forgotten() -> None:
    rests = leases.Rests(first=2.0, longest=10.0)
    assert [rests.after_refusal("a") for _ in range(4)] == [2, 4, 8, 10]
    assert rests.after_refusal("b") == 2
    rests.forget("a")
    assert rests.after_refusal("a") == 2

"""Tests work of several projects that waits for a limited number of turns."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from services.control_plane.core.turns import Turns

Worker = Callable[[str, float], Coroutine[Any, Any, None]]


def begun(most: int, story: Callable[[Turns, Worker], Coroutine[Any, Any, None]]) -> list[str]:
    """Runs the story, and returns the projects whose work began, in order."""
    order: list[str] = []
    turns = Turns(most)

    async def work(project: str, seconds: float = 0.01) -> None:
        async with turns.turn(project):
            order.append(project)
            await asyncio.sleep(seconds)

    async def run() -> None:
        async with asyncio.timeout(60):
            await story(turns, work)

    asyncio.run(run())
    return order


def test_a_project_with_much_work_delays_another_one_by_a_turn_or_two() -> None:
    async def story(_: Turns, work: Worker) -> None:
        many = [asyncio.create_task(work("a", 0.01)) for _ in range(50)]
        await asyncio.sleep(0)
        await asyncio.gather(*many, work("b", 0.01), work("c", 0.01))

    order = begun(2, story)
    assert {"b", "c"} <= set(order[:6])
    assert order.count("a") == 50


def test_no_more_than_the_limit_runs_and_whoever_is_alone_has_all_of_it() -> None:
    running, seen = 0, list[int]()

    async def story(turns: Turns, _: Worker) -> None:
        async def work() -> None:
            nonlocal running
            async with turns.turn("a"):
                running += 1
                seen.append(running)
                await asyncio.sleep(0.001)
                running -= 1

        await asyncio.gather(*(work() for _ in range(20)))

    begun(3, story)
    assert max(seen) == 3


def test_where_turns_are_left_free_the_next_project_need_not_wait() -> None:
    turns, running = Turns(9, leaves_free=True), Counter[str]()

    async def work(project: str, seconds: float) -> None:
        async with turns.turn(project):
            running[project] += 1
            await asyncio.sleep(seconds)

    async def run() -> None:
        many = [asyncio.create_task(work("a", 60)) for _ in range(20)]
        await asyncio.sleep(0)
        many += [asyncio.create_task(work("b", 60)) for _ in range(20)]
        await asyncio.sleep(0.01)
        assert running == {"a": 5, "b": 2}  # and two are free
        async with asyncio.timeout(30):
            await work("c", 0)
        for task in many:
            task.cancel()
        await asyncio.gather(*many, return_exceptions=True)
        await asyncio.gather(*(work("d", 0) for _ in range(20)))  # all turns were given back

    asyncio.run(run())


def test_who_leaves_while_waiting_or_working_keeps_no_turn() -> None:
    async def story(_: Turns, work: Worker) -> None:
        working = asyncio.create_task(work("a", 60))
        waiting = [asyncio.create_task(work("b", 60)) for _ in range(3)]
        await asyncio.sleep(0.01)
        waiting[1].cancel()
        working.cancel()
        waiting[0].cancel()  # at the moment at which its turn comes, or just before
        await asyncio.sleep(0.01)
        waiting[2].cancel()
        await asyncio.gather(working, *waiting, return_exceptions=True)
        await work("c", 0)

    assert begun(1, story) == ["a", "b", "c"]

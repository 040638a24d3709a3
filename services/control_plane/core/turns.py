"""Lets a few pieces of work run at the same time, while the projects whose work waits take turns."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A limit on the work that runs at the same time.

    The next turn goes to the project with the least work under way; equal ones go one after the other. So a project
    alone may take all turns, and however much of its work waits, it delays another project by a turn or two.

    With `leaves_free`, a project that has some work under way gets no more turns than it leaves free: half of them if
    it is alone. So the next project need not wait at all. That is for work that may take long and costs little.
    """

    def __init__(self, most: int, *, leaves_free: bool = False) -> None:
        self.most, self._leaves_free = most, leaves_free
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by project, the next project first

    @asynccontextmanager
    async def turn(self, project_id: str) -> AsyncIterator[None]:
        """Waits for a turn of the project, and holds it until the end of the `with` block."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(project_id, deque()).append(turn)
        self._grant()
        try:
            await turn
            yield
        finally:
            if not turn.cancelled():
                self._running[project_id] -= 1
                self._running += Counter()  # drops projects that have nothing under way
                self._grant()

    def _grant(self) -> None:
        while self._waiting and self._running.total() < self.most:
            project_id = min(self._waiting, key=self._running.__getitem__)
            if self._leaves_free and 0 < self._running[project_id] >= self.most - self._running.total():
                return
            queue = self._waiting.pop(project_id)
            turn = queue.popleft()
            if queue:
                self._waiting[project_id] = queue
            if not turn.cancelled():
                self._running[project_id] += 1
                turn.set_result(None)

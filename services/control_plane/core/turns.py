"""Limits how many tasks, such as checks of files, run at the same time. Projects whose tasks wait take turns."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A limit on the number of tasks that run at the same time, which projects share fairly.

    The next task to run belongs to the project with the fewest running tasks; projects with equally many running tasks
    take turns. A project without competitors may therefore run as many tasks as the limit allows. Many waiting tasks of
    one project delay a task of another project by one or two tasks only.

    If `leaves_free` is true, a project with running tasks may start another one only while it runs fewer tasks than the
    limit leaves free. So a project without competitors uses about half of the limit, and the first task of another
    project normally need not wait. This suits tasks that may take long and cost little.
    """

    def __init__(self, most: int, *, leaves_free: bool = False) -> None:
        self.most, self._leaves_free = most, leaves_free
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by project, the next project first

    @asynccontextmanager
    async def turn(self, project_id: str) -> AsyncIterator[None]:
        """Waits until the project may run a task, and counts the task as running until the end of the `with` block."""
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

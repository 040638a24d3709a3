"""Look-ups by key: who asks at the same moment shares a statement."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Batcher(Generic[Value]):
    """One look-up of `find` runs at a time.

    Who comes meanwhile waits for the next one, which sees all that was committed before he asked.
    """

    def __init__(self, find: Callable[[list[str]], Awaitable[Mapping[str, Value]]]) -> None:
        self._find = find
        self._asked: dict[str, asyncio.Future[Value | None]] = {}  # what the next look-up asks for
        self._reading: asyncio.Task[None] | None = None

    async def get(self, key: str) -> Value | None:
        """What `find` has for the key. Raises what it raises."""
        if key not in self._asked:
            self._asked[key] = asyncio.get_running_loop().create_future()
        answer = self._asked[key]
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        return await asyncio.shield(answer)  # others may wait for it

    async def _read(self) -> None:
        """Until nobody asks."""
        while asked := self._asked:
            self._asked = {}
            try:
                found = await self._find(list(asked))
            except Exception as error:
                for future in asked.values():
                    future.set_exception(error)
            else:
                for key, future in asked.items():
                    future.set_result(found.get(key))
        self._reading = None

"""Batches look-ups by key: callers that request values at the same time share one database query."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Batcher(Generic[Value]):
    """Looks up values by key for many callers, with one call of the function `find` at a time.

    Each call gets all keys that callers wait for at that moment. A key that is requested during a call waits for the
    next call. So every value includes all changes that were committed before it was requested.
    """

    def __init__(self, find: Callable[[list[str]], Awaitable[Mapping[str, Value]]]) -> None:
        self._find = find
        self._asked: dict[str, asyncio.Future[Value | None]] = {}  # the keys of the next call
        self._reading: asyncio.Task[None] | None = None

    async def get(self, key: str) -> Value | None:
        """Returns the value of the key. Returns None if the key has no value.

        The value comes from the function `find`, which was passed to the constructor. Raises the error that `find`
        raises.
        """
        if key not in self._asked:
            self._asked[key] = asyncio.get_running_loop().create_future()
        answer = self._asked[key]
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        return await asyncio.shield(answer)  # other callers may be waiting for the same answer

    async def _read(self) -> None:
        """Calls `find` with the requested keys, and gives the values to the callers that wait. Repeats this until no
        caller waits for a key.
        """
        while asked := self._asked:
            self._asked = {}
            try:
                values = await self._find(list(asked))
            except Exception as error:
                for future in asked.values():
                    future.set_exception(error)
            else:
                for key, future in asked.items():
                    future.set_result(values.get(key))
        self._reading = None

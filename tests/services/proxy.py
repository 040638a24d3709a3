"""Defines a TCP proxy between a client and a server, which can refuse, delay and cut connections."""

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy:
    """Passes each connection on to `target`, which is (host, port) or the path of a Unix socket.

    If `refusing` is true, new connections are closed immediately. `delay_seconds` is the wait before each chunk of data
    is passed on. If `cut_after` is set, a connection is closed after this number of bytes from the client; if
    `truncate_after` is set, after this number of bytes from the server. With `fail_every` n, each n-th connection
    is closed immediately. The proxy listens at the address `host`.
    `passed` counts the bytes that went through it, both ways.
    """

    def __init__(self, target: tuple[str, int] | str | None = None, *, host: str = "127.0.0.1") -> None:
        self.refusing, self.delay_seconds = False, 0.0
        self.cut_after: int | None = None
        self.truncate_after: int | None = None
        self.fail_every: int | None = None
        self.host, self._count, self.passed = host, 0, 0
        self._target = target
        self._passing: set[asyncio.Event] = set()  # of each connection
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._accept, host, 0, backlog=1000))
        self.port = int(self._server.sockets[0].getsockname()[1])
        self.url = f"http://{host}:{self.port}"
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def swallow(self) -> None:
        """Passes on nothing more on the connections that are open now, but keeps them open."""
        self._run(self._swallow())

    def cut(self) -> None:
        """Closes the connections that are open now."""
        self._run(self._cut())

    def pass_on(self) -> None:
        """Passes everything on again, as at the start, and also what was held back by `swallow`."""
        self.refusing, self.delay_seconds = False, 0.0
        self.cut_after = self.truncate_after = self.fail_every = None
        self._run(self._pass_on())

    def close(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _swallow(self) -> None:
        for passing in self._passing:
            passing.clear()

    async def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _pass_on(self) -> None:
        for passing in self._passing:
            passing.set()

    async def _end(self) -> None:
        await asyncio.sleep(0.05)  # asyncio never closes a connection that it is accepting when its server closes
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._cut()
        await asyncio.sleep(0.05)  # the loop closes an aborted socket in its next round

    def _accept(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        self._writers.add(answer)
        task = self._loop.create_task(self._serve(client, answer))
        task.add_done_callback(lambda _: answer.close())

    async def _serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        self._count += 1
        fails = self.refusing or (self.fail_every and self._count % self.fail_every == 0)
        server = None if fails else await self._connect()
        if server is None:
            return
        source, request = server
        self._writers.add(request)
        passing = asyncio.Event()
        passing.set()
        self._passing.add(passing)
        try:
            await _first_end(
                self._pump(client, request, passing, self.cut_after),
                self._pump(source, answer, passing, self.truncate_after),
            )
        finally:
            self._passing.discard(passing)
            request.close()

    async def _connect(self) -> Streams | None:
        """Connects to the server. Returns None if it accepts no connection."""
        with suppress(OSError):
            if isinstance(self._target, str):
                return await asyncio.open_unix_connection(self._target)
            assert self._target is not None
            return await asyncio.open_connection(*self._target)
        return None

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, passing: asyncio.Event, most: int | None = None
    ) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                await asyncio.sleep(self.delay_seconds)
                await passing.wait()
                self.passed += len(data)
                sink.write(data[:most])
                await sink.drain()
                if most is not None and (most := most - len(data)) <= 0:
                    return


async def _first_end(*pumps: Coroutine[Any, Any, None]) -> None:
    """Runs the coroutines until the first of them ends, and then cancels the others."""
    tasks = [asyncio.ensure_future(pump) for pump in pumps]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()

"""Tests streams with many readers, slow readers, and a listener that hears nothing: no event is lost, and none
waits."""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import openai
import psycopg
import pytest

from services.contract import JobEvent, Message
from services.control_plane.attempts import attempts
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Job
from services.control_plane.jobs import responses
from services.control_plane.jobs.events import events
from services.control_plane.jobs.events.events import newest_events
from services.control_plane.progress import streams
from services.control_plane.progress.streams import Streams
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, pairs
from tests.services.control_plane.steps import end_job, insert_message, insert_steps, pack_all

NUM_STREAMS = 300
NUMBER = re.compile(rb'"message":"(\d+) ')


@pytest.fixture
def job_id(client: openai.OpenAI, settings: Settings) -> str:
    """Creates a job with an attempt that may report, and returns its id."""
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"}).id

    async def open_attempt() -> None:
        store = Store(settings.database_url)
        async with store.begin() as session:
            await attempts.begin(session, job, 1, None, num_accelerators=0)
        await store.close()

    asyncio.run(open_attempt())
    return job


async def report(store: Store, settings: Settings, job_id: str, numbers: range, padding: int = 1) -> None:
    events = [
        JobEvent(seq=number, created_at=time.time(), report=Message(message=f"{number} {'x' * padding}"))
        for number in numbers
    ]
    async with store.begin() as session:
        await attempts.record(session, job_id, 1, events, settings, posted=True)


async def open_stream(base_url: str, job_id: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = f"GET /v1/x/jobs/{job_id}/stream HTTP/1.1\r\nHost: raydpo\r\nAuthorization: Bearer {API_KEY}\r\n\r\n"
    writer.write(request.encode())
    await reader.readuntil(b"fine_tuning.job.progress")
    return reader, writer


async def numbers_until(reader: asyncio.StreamReader, last: int) -> list[int]:
    """Reads events until the one with the number `last`, and returns the numbers of all in order."""
    found: list[int] = []
    while last not in found:
        line = await reader.readuntil(b"\n")
        found += [int(match) for match in NUMBER.findall(line)]
    return found


def run(settings: Settings, work: Callable[[Store], Any]) -> None:
    async def with_store() -> None:
        store = Store(settings.database_url)
        try:
            async with asyncio.timeout(300):
                await work(store)
        finally:
            await store.close()

    asyncio.run(with_store())


@pytest.mark.slow
def test_many_streams_get_every_event_once_while_slow_ones_do_not_read(
    base_url: str, settings: Settings, job_id: str
) -> None:
    async def work(store: Store) -> None:
        streams = [await open_stream(base_url, job_id) for _ in range(NUM_STREAMS)]
        slow = streams[:3]
        padding = 20_000  # more than sockets hold, in the end
        batches = [range(start, start + 100) for start in range(0, 600, 100)]
        for _, writer in slow:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        reading = [asyncio.create_task(numbers_until(reader, 599)) for reader, _ in streams[3:10]]
        others = [asyncio.create_task(numbers_until(reader, 99)) for reader, _ in streams[10:]]
        await report(store, settings, job_id, batches[0])
        assert all(found == list(range(100)) for found in await asyncio.gather(*others))
        for _, writer in streams[10:]:
            writer.close()
        for batch in batches[1:]:
            await report(store, settings, job_id, batch, padding)
        assert all(found == list(range(600)) for found in await asyncio.gather(*reading))
        for reader, writer in slow:
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert await numbers_until(reader, 599) == list(range(600))
        for _, writer in streams[:10]:
            writer.close()

    run(settings, work)


@pytest.mark.slow
def test_a_lost_listening_connection_loses_no_event(base_url: str, settings: Settings, job_id: str) -> None:
    async def work(store: Store) -> None:
        reader, writer = await open_stream(base_url, job_id)
        with psycopg.connect(settings.database_url, autocommit=True) as admin:
            listening = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            listening += " WHERE application_name = 'raydpo jobs' AND datname = current_database()"
            assert admin.execute(listening).fetchall() == [(True,)]
        await report(store, settings, job_id, range(3))
        assert await numbers_until(reader, 2) == [0, 1, 2]
        writer.close()

    run(settings, work)


def test_an_idle_stream_holds_no_database_connection_and_hears_that_it_is_alive(
    settings: Settings, job_id: str, base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "KEEPALIVE_SECONDS", 0.2)

    async def work(store: Store) -> None:
        hub = Streams(store, settings)
        task = asyncio.create_task(hub.run())
        followed = [hub.follow(job_id, 0) for _ in range(50)]
        for stream in followed:
            while b"progress" not in await anext(stream):
                pass
        assert store.pool.checkedout() == 0
        for stream in followed[:2]:
            while await anext(stream) != streams.KEEPALIVE:
                pass
        await hub.close()
        for stream in followed:
            assert b"[DONE]" not in b"".join([frame async for frame in stream])
        task.cancel()

    run(settings, work)


def test_a_job_that_cannot_be_shown_stops_the_streams_of_no_other_job(
    client: openai.OpenAI, settings: Settings, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = client.fine_tuning.jobs.retrieve(job_id).training_file
    other = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, method={"type": "dpo"}).id
    looked_at, other_is_shown = list[str](), asyncio.Event()

    def job_object(row: Job, settings: Settings, evaluations: Any) -> dict[str, Any]:
        looked_at.append(row.id)
        if row.id == looked_at[0]:
            raise KeyError("a field that this release expects")
        other_is_shown.set()
        return responses.job_object(row, settings, evaluations)

    async def work(store: Store) -> None:
        hub = Streams(store, settings)
        follows = [hub.follow(each, 0) for each in (job_id, other)]
        for each in follows:
            await anext(each)  # both jobs are read at the same time
        task = asyncio.create_task(hub.run())
        await other_is_shown.wait()
        for each in follows:
            await each.aclose()
        task.cancel()

    monkeypatch.setattr(streams, "job_object", job_object)
    run(settings, work)


def test_a_stream_that_joins_while_the_last_one_leaves_misses_nothing(
    settings: Settings, job_id: str, base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream joins during a query about the job, which is made slow here."""
    looking, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(*arguments: Any, **options: Any) -> Any:
        looking.set()
        await go_on.wait()
        return await newest_events(*arguments, **options)

    async def read(stream: AsyncGenerator[bytes], last: int) -> list[int]:
        found: list[int] = []
        async with asyncio.timeout(300):
            while last not in found:
                found += [int(match) for match in NUMBER.findall(await anext(stream))]
        return found

    async def work(store: Store) -> None:
        hub = Streams(store, settings)
        task = asyncio.create_task(hub.run())
        await report(store, settings, job_id, range(10))
        leaving = hub.follow(job_id, 0)
        assert await read(leaving, 9) == list(range(10))
        monkeypatch.setattr(streams, "newest_events", slowly)
        await report(store, settings, job_id, range(10, 15))
        await looking.wait()
        await leaving.aclose()
        joining = hub.follow(job_id, 0)
        await anext(joining)
        go_on.set()
        assert await read(joining, 14) == list(range(15))
        await joining.aclose()
        task.cancel()

    run(settings, work)


@pytest.fixture
def ends_meanwhile(settings: Settings, job_id: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Adds 2,900 steps to the job, the first 1,000 of them in a block. Returns a function that lets the job end while
    its events are read, newest first or oldest first: between the read of the rows and that of the blocks come a
    message and ten steps, the job ends, and all its steps are packed."""
    insert_steps(settings.database_url, job_id, range(1, 2901))
    pack_all(settings.database_url)

    def end(newest: bool) -> None:
        with_packed, waits = events._with_packed, [True]

        async def late(session: Any, of_job: str, rows: Any, **bounds: Any) -> Any:
            is_last = newest or len(rows) < bounds["limit"]  # the statement had room for later rows
            if of_job == job_id and bounds["newest"] == newest and is_last and waits:
                waits.clear()
                await asyncio.to_thread(go_on)
            return await with_packed(session, of_job, rows, **bounds)

        monkeypatch.setattr(events, "_with_packed", late)

    def go_on() -> None:
        insert_message(settings.database_url, job_id, "between")
        insert_steps(settings.database_url, job_id, range(2901, 2911))
        end_job(settings.database_url, job_id)
        pack_all(settings.database_url)

    return end


ALL = [*range(1, 2901), "between", *range(2901, 2911)]


def told(objects: list[dict[str, Any]]) -> list[int | str]:
    """Returns the steps and the messages of the events, without those about the job's begin."""
    found = [each["data"]["step"] if each["type"] == "metrics" else each["message"] for each in objects]
    return [each for each in found if each == "between" or isinstance(each, int)]


@pytest.mark.parametrize("newest", [True, False])
def test_a_stream_misses_no_message_before_steps_that_are_packed_while_it_reads(
    settings: Settings, job_id: str, ends_meanwhile: Callable[[bool], None], newest: bool
) -> None:
    async def work(store: Store) -> None:
        sent_before = 2850 if newest else 0  # only a stream that is near the end is sent the newest events in memory
        async with store.snapshot() as session:
            after = events.step_event_id(job_id, sent_before)
            place = await events.place_of(session, job_id, after) if sent_before else 0
        assert place is not None
        hub = Streams(store, settings)
        task = asyncio.create_task(hub.run())
        ends_meanwhile(newest)
        async with asyncio.timeout(300):
            frames = b"".join([frame async for frame in hub.follow(job_id, place)])
        task.cancel()
        await asyncio.wait({task})  # a look that is under way returns its connection before the store is closed
        assert b"[DONE]" in frames
        sent = [json.loads(line) for line in re.findall(rb"^data: ({.*)$", frames, re.MULTILINE)]
        assert told([each for each in sent if each["object"] == "fine_tuning.job.event"]) == ALL[sent_before:]

    run(settings, work)


def test_a_list_misses_no_message_before_steps_that_are_packed_while_it_is_read(
    api: httpx.Client, job_id: str, ends_meanwhile: Callable[[bool], None]
) -> None:
    ends_meanwhile(True)
    for expected in (ALL[2899::-1], ALL[::-1]):  # the list as it was before the job went on, and after that
        found = told(api.get(f"/fine_tuning/jobs/{job_id}/events", params={"limit": 100}).json()["data"])
        assert len(found) > 90  # what the job waits for is told as well
        assert found == expected[: len(found)]

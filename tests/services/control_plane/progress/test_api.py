"""Tests the event streams of jobs over HTTP. A real database announces its changes."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import psycopg
import pytest

from services.contract import JobEvent, Message, Progress, StepMetrics
from services.control_plane.attempts import attempts
from services.control_plane.core.store import Store
from services.control_plane.jobs import jobs
from services.control_plane.progress import streams
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, pairs

TELL = "INSERT INTO events (public_id, job_id, attempt, level, type, message) VALUES (%s, %s, 0, 'info', 'message', '')"
HEADERS = {"Authorization": f"Bearer {API_KEY}"}


@pytest.fixture
def job_id(client: openai.OpenAI) -> str:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"}).id


@pytest.fixture
def attempt(settings: Settings, job_id: str) -> int:
    async def open_one(store: Store) -> None:
        async with store.begin() as session:
            await attempts.begin(session, job_id, 1, None, num_accelerators=0)

    with_store(settings, open_one)
    return 1


def with_store(settings: Settings, work: Any) -> Any:
    async def run() -> Any:
        store = Store(settings.database_url)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def record(settings: Settings, job_id: str, first: int, reports: list[Any]) -> None:
    events = [JobEvent(seq=first + i, created_at=time.time(), report=report) for i, report in enumerate(reports)]

    async def write(store: Store) -> None:
        async with store.begin() as session:
            await attempts.record(session, job_id, 1, events, settings, posted=True)

    with_store(settings, write)


@contextmanager
def streaming(base_url: str, job_id: str, **headers: str) -> Iterator[Iterator[tuple[str | None, Any]]]:
    """Opens the stream of a job, and yields the id and the data of each event."""
    with (
        httpx.Client(trust_env=False, timeout=120) as http,
        http.stream("GET", f"{base_url}/v1/x/jobs/{job_id}/stream", headers=HEADERS | headers) as response,
    ):
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield _events(response)


def _events(response: httpx.Response) -> Iterator[tuple[str | None, Any]]:
    last_id = None
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            last_id = value
        elif name == "data":
            yield last_id, value if value == "[DONE]" else json.loads(value)
            last_id = None


def until(events: Iterator[tuple[str | None, Any]], message: str) -> list[Any]:
    """Returns the data of all events up to the one with this message."""
    found = []
    for _, data in events:
        found.append(data)
        if data.get("message") == message:
            return found
    raise AssertionError(f"'{message}' did not come")


def test_a_stream_tells_all_that_was_and_all_that_comes_and_ends_with_the_job(
    client: openai.OpenAI, base_url: str, settings: Settings, job_id: str, attempt: int
) -> None:
    with streaming(base_url, job_id) as events:
        assert next(events)[1]["message"] == f"Created fine-tuning job: {job_id}"
        state = next(data for _, data in events if data["object"] == "fine_tuning.job.progress")
        assert (state["status"], state["progress"], state["estimated_finish"]) == ("queued", None, None)
        record(settings, job_id, 0, [Message(message="one"), Message(message="two", level="warn")])
        until(events, "one")
        assert until(events, "two")[-1]["level"] == "warn"
        client.fine_tuning.jobs.cancel(job_id)
        rest = [data for _, data in events]
    messages = [data["message"] for data in rest if "message" in data]
    waiting = "Waiting for"  # a regular look may come in between, and tell that Ray does not answer
    assert [message for message in messages if not message.startswith(waiting)] == [
        "Cancellation requested",
        "The job was cancelled",
    ]
    assert rest[-2] == client.fine_tuning.jobs.retrieve(job_id).model_dump(exclude_unset=True)
    assert rest[-1] == "[DONE]"


def test_a_stream_resumes_after_the_event_that_the_client_saw_last(
    client: openai.OpenAI, base_url: str, settings: Settings, job_id: str, attempt: int
) -> None:
    record(settings, job_id, 0, [Message(message=str(number)) for number in range(5)])
    with streaming(base_url, job_id) as events:
        seen = []
        while not seen or seen[-1][1].get("message") != "2":
            seen.append(next(events))
    with streaming(base_url, job_id, **{"Last-Event-ID": str(seen[-1][0])}) as events:
        found = until(events, "4")
    assert [data["message"] for data in found if "message" in data and data["message"].isdigit()] == ["3", "4"]
    listed = [event.id for event in client.fine_tuning.jobs.list_events(job_id)]
    assert listed[::-1][: len(seen)] == [name for name, _ in seen]


def test_an_event_of_another_job_is_refused_as_a_place_to_resume(base_url: str, job_id: str) -> None:
    url = f"{base_url}/v1/x/jobs/{job_id}/stream"
    answer = httpx.get(url, headers=HEADERS | {"Last-Event-ID": "ftevent-no"}, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Last-Event-ID"
    assert httpx.get(f"{base_url}/v1/x/jobs/ftjob-no/stream", headers=HEADERS, trust_env=False).status_code == 404


def test_a_long_history_is_read_from_the_table_and_joins_what_is_in_memory(
    base_url: str, settings: Settings, job_id: str, attempt: int
) -> None:
    steps = streams.PAGE + 2 * streams.KEPT
    record(
        settings,
        job_id,
        0,
        [StepMetrics(step=step + 1, total_steps=steps, metrics={"loss": 0.5}) for step in range(steps)],
    )
    with streaming(base_url, job_id) as events:
        found: list[int] = []
        while len(found) < steps:
            data = next(events)[1]
            found += [data["data"]["step"]] if data.get("type") == "metrics" else []
    assert found == list(range(1, steps + 1))


def test_progress_without_an_event_is_streamed(base_url: str, settings: Settings, job_id: str, attempt: int) -> None:
    async def start(store: Store) -> None:
        async with store.begin() as session:
            job = await jobs.find(session, job_id)
            await jobs.move(session, job, "running", actor="test", event="It starts")

    with_store(settings, start)
    with streaming(base_url, job_id) as events:
        assert next(data for _, data in events if data["object"] == "fine_tuning.job.progress")["progress"] is None
        record(settings, job_id, 0, [Progress(stage="encoding", done=5, total=10)])
        progress = next(data["progress"] for _, data in events if data.get("progress"))
    assert (progress["stage"], progress["done"], progress["total"]) == ("encoding", 5, 10)


def test_events_of_one_job_are_seen_in_the_order_of_their_ids(settings: Settings, job_id: str) -> None:
    """The second of two open transactions waits for the first, so no reader sees a higher id before a lower one."""
    order = []
    with psycopg.connect(settings.database_url) as first, psycopg.connect(settings.database_url) as second:
        first.execute(TELL, (f"{job_id}-first", job_id))

        def write() -> None:
            second.execute(TELL, (f"{job_id}-second", job_id))
            order.append("second")
            second.commit()

        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.3)
        order.append("first")
        first.commit()
        thread.join()
        query = "SELECT public_id FROM events WHERE job_id = %s AND public_id LIKE %s ORDER BY id"
        found = [name for (name,) in first.execute(query, (job_id, f"{job_id}-%"))]
    assert order == ["first", "second"]
    assert found == [f"{job_id}-first", f"{job_id}-second"]


def test_events_of_different_jobs_do_not_wait_for_each_other(
    client: openai.OpenAI, settings: Settings, job_id: str
) -> None:
    file = client.fine_tuning.jobs.retrieve(job_id).training_file
    other = client.fine_tuning.jobs.create(model="tiny", training_file=file, method={"type": "dpo"}).id
    with psycopg.connect(settings.database_url) as first, psycopg.connect(settings.database_url) as second:
        second.execute("SET lock_timeout = '1s'")
        for connection, job in ((first, job_id), (second, other)):
            connection.execute(TELL, (f"{job}-x", job))


def test_a_list_of_events_may_leave_steps_out(base_url: str, settings: Settings, job_id: str, attempt: int) -> None:
    step = StepMetrics(step=1, total_steps=2, metrics={"loss": 0.5})
    record(settings, job_id, 0, [Message(message="one"), step, Message(message="two")])
    url = f"{base_url}/v1/fine_tuning/jobs/{job_id}/events"
    with httpx.Client(headers=HEADERS, trust_env=False) as http:
        messages, steps = (http.get(url, params={"type": kind}).json()["data"] for kind in ("message", "metrics"))
    assert [event["message"] for event in messages][:2] == ["two", "one"]
    assert [event["data"]["step"] for event in steps] == [1]

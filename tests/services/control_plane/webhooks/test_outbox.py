"""Tests that webhooks reach real receivers at least once, with ids, whatever dies or is slow."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import openai
import psycopg
import pytest
from sqlalchemy import event, text

from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import Job, WebhookEndpoint
from services.control_plane.jobs import jobs
from services.control_plane.settings import Settings
from services.control_plane.webhooks import webhooks
from services.control_plane.webhooks.outbox import (
    AT_ONCE,
    AT_ONCE_TO_ONE,
    LONGEST_PAUSE_SECONDS,
    Sender,
    give_up_old,
    pause_seconds,
)
from tests.conftest import new_database
from tests.services.control_plane.conftest import EVENT_TYPES, FAILED, pairs
from tests.services.receiver import Behaviour, Received, Receiver

ROOT = str(Path(__file__).parents[4])
CLOSED: dict[str, dict[str, Any]] = {
    "succeeded": {"fine_tuned_model": "ft:tiny:raydpo::1"},
    "failed": {"error": {"code": "c", "message": "m", "param": None}},
    "cancelled": {},
}


@pytest.fixture(scope="module")
def settings(offline: Settings, receiver: Receiver) -> Settings:
    return offline.model_copy(update={"webhook_urls": [receiver.url]})


@pytest.fixture(autouse=True)
def clean(client: openai.OpenAI, settings: Settings, receiver: Receiver) -> Iterator[None]:
    """Removes the endpoints and rows that the test leaves."""
    receiver.paths.clear()
    receiver.received.clear()
    yield
    sql(settings, "UPDATE outbox SET due_at = NULL")
    for endpoint in list(client.webhooks.list()):
        client.webhooks.delete(endpoint.id)


@pytest.fixture(scope="module")
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id


@pytest.fixture
def endpoint(client: openai.OpenAI, receiver: Receiver) -> Callable[..., Any]:
    def make(path: str, event_types: Any = EVENT_TYPES) -> Any:
        return client.webhooks.create(name=path, url=f"{receiver.url}{path}", event_types=event_types)

    return make


@pytest.fixture
def end_job(client: openai.OpenAI, settings: Settings, file_id: str) -> Callable[..., str]:
    def end(to: str = "cancelled") -> str:
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, method={"type": "dpo"})
        move(settings, job.id, to)
        return job.id

    return end


def move(settings: Settings, job_id: str, to: str, *, then: Exception | None = None) -> None:
    async def run() -> None:
        store = Store(settings.database_url)
        try:
            async with store.begin() as session:
                for state in ("running", to):
                    job = await session.get_one(Job, job_id, populate_existing=True)
                    values = CLOSED.get(state, {})
                    await jobs.move(session, job, state, values, actor="test", event=state)
                if then:
                    raise then
        finally:
            await store.close()

    asyncio.run(run())


def sql(settings: Settings, statement: str) -> list[Any]:
    with psycopg.connect(settings.database_url) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def let_time_pass(settings: Settings) -> None:
    sql(settings, "UPDATE outbox SET due_at = now() WHERE due_at IS NOT NULL")
    sql(settings, "UPDATE webhook_endpoints SET retry_at = now() WHERE retry_at IS NOT NULL")


def wait_for(done: Callable[[], Any], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def outcomes(settings: Settings) -> list[Any]:
    return sql(settings, "SELECT outcome, num_sends, due_at IS NULL FROM outbox WHERE num_sends > 0 ORDER BY id DESC")


def unwrap(client: openai.OpenAI, message: Received, secret: str) -> Any:
    return client.webhooks.unwrap(message.body, message.headers, secret=secret)


@pytest.mark.slow
@pytest.mark.parametrize("to", CLOSED)
def test_the_end_of_a_job_is_told_once_to_each_endpoint_that_asked(
    client: openai.OpenAI, settings: Settings, receiver: Receiver, endpoint: Any, end_job: Any, to: str
) -> None:
    one, two = endpoint("/one"), endpoint("/two", [f"fine_tuning.job.{to}"])
    endpoint("/other", [event_type for event_type in EVENT_TYPES if not event_type.endswith(to)])
    job_id = end_job(to)
    wait_for(lambda: receiver.at("/one") and receiver.at("/two"))
    wait_for(lambda: outcomes(settings)[:2] == [("answered 200", 1, True)] * 2)
    (first,), (second,) = receiver.at("/one"), receiver.at("/two")
    assert not receiver.at("/other")
    event = unwrap(client, first, one.signing_secret)
    assert event.to_dict() == {
        "id": first.headers["webhook-id"],
        "object": "event",
        "created_at": event.created_at,
        "type": f"fine_tuning.job.{to}",
        "data": {"id": job_id},
    }
    assert event.id.startswith("evt_")
    assert abs(event.created_at - time.time()) < 60
    assert unwrap(client, second, two.signing_secret) == event
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(client, first, two.signing_secret)


def test_a_move_that_is_rolled_back_is_not_told(
    client: openai.OpenAI, settings: Settings, endpoint: Any, file_id: str
) -> None:
    endpoint("/one")
    before = sql(settings, "SELECT count(*) FROM outbox")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, method={"type": "dpo"})
    with pytest.raises(RuntimeError, match="rolled back"):
        move(settings, job.id, "succeeded", then=RuntimeError("rolled back"))
    assert sql(settings, "SELECT count(*) FROM outbox") == before
    client.fine_tuning.jobs.cancel(job.id)
    assert sql(settings, "SELECT count(*) FROM outbox") == [(before[0][0] + 1,)]


@pytest.mark.slow
def test_what_fails_is_sent_again_under_the_same_id_after_a_pause(
    client: openai.OpenAI, settings: Settings, receiver: Receiver, endpoint: Any, end_job: Any
) -> None:
    receiver.paths["/one"] = Behaviour(statuses=[500, 302, 404, 204], location=f"{receiver.url}/two")
    made = endpoint("/one")
    end_job()
    for number, outcome in enumerate(("answered 500", "answered 302", "answered 404"), 1):
        wait_for(lambda outcome=outcome, number=number: outcomes(settings)[:1] == [(outcome, number, False)])  # type: ignore[misc]
        ((pause,),) = sql(settings, "SELECT extract(epoch FROM due_at - now()) FROM outbox WHERE due_at IS NOT NULL")
        assert 5 * 2 ** (number - 1) * 0.8 - 3.9 < pause < 5 * 2 ** (number - 1) * 1.2
        let_time_pass(settings)
    wait_for(lambda: outcomes(settings)[:1] == [("answered 204", 4, True)])
    assert not receiver.at("/two")
    assert len({message.headers["webhook-id"] for message in receiver.at("/one")}) == 1
    for message in receiver.at("/one"):
        unwrap(client, message, made.signing_secret)


@pytest.mark.slow
def test_after_three_days_nothing_is_sent_any_more(
    settings: Settings, receiver: Receiver, endpoint: Any, end_job: Any
) -> None:
    receiver.paths["/one"] = Behaviour(statuses=[500, 500])
    endpoint("/one")
    end_job()
    wait_for(lambda: outcomes(settings)[:1] == [("answered 500", 1, False)])
    sql(settings, "UPDATE outbox SET created_at = now() - interval '73 hours' WHERE due_at IS NOT NULL")
    let_time_pass(settings)
    wait_for(lambda: outcomes(settings)[:1] == [("answered 500", 2, True)])


@pytest.mark.slow
def test_an_endpoint_that_is_gone_is_disabled_until_it_is_given_a_url(
    client: openai.OpenAI, settings: Settings, receiver: Receiver, endpoint: Any, end_job: Any
) -> None:
    receiver.paths["/one"] = Behaviour(statuses=[410])
    made = endpoint("/one")
    end_job()
    wait_for(lambda: outcomes(settings)[:1] == [("answered 410", 1, True)])

    def disabled_at() -> Any:
        return client.webhooks.retrieve(made.id).to_dict()["x_raydpo"]["disabled_at"]  # type: ignore[index]

    assert abs(disabled_at() - time.time()) < 60
    end_job()
    client.webhooks.update(made.id, name="still gone")
    assert disabled_at()
    client.webhooks.update(made.id, url=made.url)
    assert disabled_at() is None
    end_job()
    wait_for(lambda: len(receiver.at("/one")) == 2)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["DELETE", "410"])
def test_what_waits_for_an_endpoint_that_went_away_is_not_sent(
    client: openai.OpenAI, settings: Settings, receiver: Receiver, endpoint: Any, end_job: Any, change: str
) -> None:
    receiver.paths["/one"] = Behaviour(statuses=[500])
    made = endpoint("/one")
    end_job()
    wait_for(lambda: outcomes(settings)[:1] == [("answered 500", 1, False)])
    if change == "DELETE":
        client.webhooks.delete(made.id)
    else:
        sql(settings, f"UPDATE webhook_endpoints SET disabled_at = now() WHERE id = '{made.id}'")
    let_time_pass(settings)
    wait_for(lambda: outcomes(settings)[:1] == [("not sent: the endpoint is disabled or deleted", 2, True)])
    assert len(receiver.at("/one")) == 1


def test_a_rotated_secret_signs_beside_the_old_one_for_a_day(
    client: openai.OpenAI, settings: Settings, receiver: Receiver, endpoint: Any
) -> None:
    made = endpoint("/one")
    new = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    client.webhooks.test(made.id, event_type=FAILED)
    sql(settings, "UPDATE webhook_endpoints SET old_secret_until = now() - interval '1 second'")
    client.webhooks.test(made.id, event_type=FAILED)
    client.webhooks.rotate_secret(made.id)
    client.webhooks.test(made.id, event_type=FAILED)
    both, alone, newest = receiver.at("/one")
    for secret in (made.signing_secret, new.signing_secret):
        assert unwrap(client, both, secret).type == FAILED
    assert unwrap(client, alone, new.signing_secret).type == FAILED
    for message, secret in ((alone, made.signing_secret), (newest, new.signing_secret)):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            unwrap(client, message, secret)


def test_how_long_an_old_secret_counts_is_told_by_the_databases_clock_alone(
    client: openai.OpenAI, settings: Settings, endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the replica that sends is two days early."""

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Ahead":
            return cls.fromtimestamp(time.time() + 2 * 86400, tz)

    async def num_signatures() -> int:
        store = Store(settings.database_url)
        async with store.begin() as session:
            row = await session.get_one(WebhookEndpoint, made.id)
        await store.close()
        return len(webhooks.signed(row, {"id": "evt_1"})[1]["webhook-signature"].split())

    made = endpoint("/one")
    client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    monkeypatch.setattr(webhooks, "datetime", Ahead)
    assert asyncio.run(num_signatures()) == 2


@pytest.mark.slow
def test_slow_endpoints_take_their_own_places_and_nobody_elses(
    settings: Settings, receiver: Receiver, endpoint: Any, end_job: Any
) -> None:
    receiver.paths["/slow"] = Behaviour(pause_seconds=1.5)
    receiver.paths["/endless"] = Behaviour(endless=True)
    for path in ("/slow", "/endless", "/quick"):
        endpoint(path)
    ends = 3 * AT_ONCE_TO_ONE
    for _ in range(ends):
        end_job()
    wait_for(lambda: len(receiver.at("/quick")) == len(receiver.at("/endless")) == ends)
    assert len(receiver.at("/slow")) < ends
    wait_for(lambda: outcomes(settings)[: 3 * ends] == [("answered 200", 1, True)] * 3 * ends)
    assert receiver.paths["/slow"].most_at_once == AT_ONCE_TO_ONE


async def claim_all(store: Store, sender: Sender) -> list[str]:
    """Returns the endpoints of the webhooks that the sender claims, in the order of the claims."""
    found = list[str]()
    while claims := await sender._claim():
        found += [claim.endpoint.id for claim in claims]
    return found


@pytest.fixture
def elsewhere(settings: Settings, postgres_url: str, receiver: Receiver) -> Callable[..., Any]:
    """Returns a function that adds waiting webhooks to a database where nobody else sends, and has a sender `act`.

    It returns what `act` returns. `rows` has the numbers of endpoints, and of webhooks for each, by project.
    """
    here = settings.model_copy(update={"database_url": new_database(postgres_url)})
    migrate(here.database_url)
    columns, columns_of_rows = (
        "id, project_id, name, url, event_types, secret",
        "endpoint_id, event_id, num_sends, body",
    )

    def acted(
        rows: dict[str, tuple[int, int]],
        before: str = "SELECT 1",
        act: Callable[[Store, Sender], Coroutine[Any, Any, Any]] = claim_all,
    ) -> Any:
        for project, (endpoints, each) in rows.items():
            sql(here, f"INSERT INTO projects (id, name) VALUES ('{project}', '{project}')")
            values = f"'{project}-' || n, '{project}', 'n', '{receiver.url}/one', '{{}}', 'whsec_c2VjcmV0'"
            ends = f"generate_series(1, {endpoints}) n"
            sql(here, f"INSERT INTO webhook_endpoints ({columns}) SELECT {values} FROM {ends}")
            values = f"""'{project}-' || n, 'evt_' || m, 0, '{{"id": "evt_1"}}'"""
            many = f"{ends}, generate_series(1, {each}) m"
            sql(here, f"INSERT INTO outbox ({columns_of_rows}) SELECT {values} FROM {many}")
        sql(here, before)

        async def work() -> Any:
            store = Store(here.database_url)
            sender = Sender(store, here)
            result = await act(store, sender)
            await sender.close()
            await store.close()
            return result

        return asyncio.run(work())

    return acted


def test_a_project_with_many_dead_endpoints_takes_half_of_the_places_and_another_one_is_next(elsewhere: Any) -> None:
    claimed = elsewhere({"hostile": (100, 20), "victim": (1, 1)})
    assert "victim-1" in claimed[:2]
    assert len(claimed) == AT_ONCE // 2 + 1
    assert Counter(name.split("-")[0] for name in claimed) == {"hostile": AT_ONCE // 2, "victim": 1}


def test_many_projects_share_the_places_and_leave_one_free(elsewhere: Any) -> None:
    claimed = elsewhere({f"p{number}": (10, 4) for number in range(7)})
    assert Counter(name.split("-")[0] for name in claimed) == {f"p{number}": AT_ONCE // 8 for number in range(7)}


def test_an_endpoint_that_fails_is_asked_by_one_send_when_its_pause_is_over(elsewhere: Any) -> None:
    change = "UPDATE webhook_endpoints SET num_failures = 3, retry_at = now() + {} WHERE id = '{}'"
    changes = [change.format("interval '1 minute'", "a-1"), change.format("interval '-1 second'", "a-2")]
    claimed = elsewhere({"a": (3, 10)}, ";".join(changes))
    assert Counter(claimed) == {"a-2": 1, "a-3": AT_ONCE_TO_ONE}


@pytest.mark.slow
@pytest.mark.parametrize(("status", "failures", "sent_again"), [(204, 0, False), (500, 3, True)])
def test_many_sends_that_end_in_one_moment_take_one_connection_to_the_database(
    elsewhere: Any, receiver: Receiver, status: int, failures: int, sent_again: bool
) -> None:
    receiver.paths["/one"] = Behaviour(statuses=[status] * 30, pause_seconds=0.5)
    columns = "outcome, num_sends, due_at IS NOT NULL, num_failures, retry_at IS NOT NULL"
    query = text(f"SELECT {columns} FROM outbox o JOIN webhook_endpoints e ON e.id = o.endpoint_id")

    async def send_all(store: Store, sender: Sender) -> tuple[int, list[Any]]:
        taken, rows = list[int](), list[Any]()
        event.listen(store.pool, "checkout", lambda *_: taken.append(store.pool.checkedout()))
        sending = asyncio.create_task(sender.run())
        while not rows or any(outcome is None for outcome, *_ in rows):
            await asyncio.sleep(0.1)
            most = max(taken, default=0)
            async with store.begin() as session:
                rows = [tuple(row) for row in await session.execute(query)]
            taken[:] = [most]
        sending.cancel()
        await asyncio.wait({sending})
        return most, rows

    most, rows = elsewhere({"a": (30, 1)}, "UPDATE webhook_endpoints SET num_failures = 2", send_all)
    assert most == 1
    assert rows == [(f"answered {status}", 1, sent_again, failures, sent_again)] * 30


@pytest.mark.slow
def test_an_endpoint_that_fails_is_left_alone_with_all_that_waits_until_it_answers(
    client: openai.OpenAI, settings: Settings, receiver: Receiver, endpoint: Any, end_job: Any
) -> None:
    receiver.paths["/one"] = Behaviour(statuses=[500])
    made = endpoint("/one")
    end_job()
    wait_for(lambda: outcomes(settings)[:1] == [("answered 500", 1, False)])
    sql(settings, "UPDATE webhook_endpoints SET retry_at = retry_at + interval '1 hour' WHERE num_failures = 1")
    for _ in range(3):
        end_job()
    endpoint("/two")
    end_job()
    wait_for(lambda: receiver.at("/two"))
    assert len(receiver.at("/one")) == 1
    client.webhooks.update(made.id, url=made.url)
    wait_for(lambda: len(receiver.at("/one")) == 5)
    assert sql(settings, f"SELECT num_failures, retry_at FROM webhook_endpoints WHERE id = '{made.id}'") == [(0, None)]


@pytest.mark.slow
def test_what_waited_three_days_behind_failures_is_given_up(
    settings: Settings, receiver: Receiver, endpoint: Any, end_job: Any
) -> None:
    receiver.paths["/one"] = Behaviour(statuses=[500])
    endpoint("/one")
    end_job()
    wait_for(lambda: outcomes(settings)[:1] == [("answered 500", 1, False)])
    end_job()
    waiting = "SELECT num_sends, outcome FROM outbox WHERE due_at IS NOT NULL ORDER BY id"
    assert sql(settings, waiting) == [(1, "answered 500"), (0, None)]
    sql(settings, "UPDATE outbox SET created_at = now() - interval '73 hours' WHERE num_sends = 0")

    async def sweep() -> None:
        store = Store(settings.database_url)
        async with store.begin() as session:
            await give_up_old(session)
        await store.close()

    asyncio.run(sweep())
    assert sql(settings, waiting) == [(1, "answered 500")]
    ((outcome,),) = sql(settings, "SELECT outcome FROM outbox WHERE num_sends = 0 ORDER BY id DESC LIMIT 1")
    assert outcome == "not sent: the endpoint did not answer for 72 hours"


@pytest.mark.slow
def test_two_control_planes_send_each_webhook_once(
    settings: Settings, receiver: Receiver, endpoint: Any, end_job: Any
) -> None:
    paths = [f"/{number}" for number in range(5)]
    for path in paths:
        endpoint(path)

    async def another() -> None:
        store = Store(settings.database_url)
        senders = [Sender(store, settings) for _ in range(2)]
        tasks = [asyncio.create_task(sender.run()) for sender in senders]
        await asyncio.to_thread(wait_for, lambda: len(receiver.received) >= 50)
        await asyncio.sleep(1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sender in senders:
            await sender.close()
        await store.close()

    others = threading.Thread(target=lambda: asyncio.run(another()))
    others.start()
    for _ in range(10):
        end_job()
    others.join()
    sent = [(message.path, message.headers["webhook-id"]) for message in receiver.received]
    assert len(sent) == len(set(sent)) == 50
    assert all(outcome == ("answered 200", 1, True) for outcome in outcomes(settings)[:50])


@contextmanager
def sender_elsewhere(database_url: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a sender of webhooks in a separate process."""
    program = """if True:
        import asyncio, sys
        from types import SimpleNamespace
        from services.control_plane.webhooks.outbox import Sender
        from services.control_plane.core.store import Store, migrate
        database_url, url = sys.argv[1:]
        asyncio.run(Sender(Store(database_url), SimpleNamespace(webhook_urls=[url])).run())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program, database_url, url], env={**os.environ, "PYTHONPATH": ROOT}
    )
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_what_was_sent_by_a_sender_that_died_before_it_noted_it_is_sent_again_with_the_same_id(
    settings: Settings, postgres_url: str, receiver: Receiver
) -> None:
    here = settings.model_copy(update={"database_url": new_database(postgres_url)})
    migrate(here.database_url)
    columns = "id, project_id, name, url, event_types, secret"
    values = f"'we_1', 'proj_default', 'n', '{receiver.url}/one', '{{}}', 'whsec_c2VjcmV0'"
    sql(here, f"INSERT INTO webhook_endpoints ({columns}) VALUES ({values})")
    values = """'we_1', 'evt_1', 0, '{"id": "evt_1"}'"""
    sql(here, f"INSERT INTO outbox (endpoint_id, event_id, num_sends, body) VALUES ({values})")
    receiver.paths["/one"] = Behaviour(pause_seconds=10)
    with sender_elsewhere(here.database_url, receiver.url):
        wait_for(lambda: receiver.at("/one"))
    receiver.paths["/one"] = Behaviour()
    leased = "SELECT outcome, num_sends, due_at BETWEEN now() AND now() + interval '60 seconds' FROM outbox"
    assert sql(here, leased) == [(None, 1, True)]
    let_time_pass(here)
    with sender_elsewhere(here.database_url, receiver.url):
        wait_for(lambda: outcomes(here) == [("answered 200", 2, True)])
    assert [message.headers["webhook-id"] for message in receiver.at("/one")] == ["evt_1", "evt_1"]


def test_pauses_double_up_to_six_hours_and_are_never_the_same() -> None:
    pauses = [pause_seconds(number) for number in range(1, 100)]
    assert all(4 * 2**n <= pause <= 6 * 2**n for n, pause in enumerate(pauses[:12]))
    assert max(pauses) <= 1.2 * LONGEST_PAUSE_SECONDS
    assert len(set(pauses)) == len(pauses)

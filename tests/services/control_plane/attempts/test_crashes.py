"""Tests that no job is lost, doubled or wrongly failed if control planes are killed at random moments."""

import asyncio
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openai
import psutil
import psycopg
import pytest

from services.control_plane.attempts.reconciler import LEASE_SECONDS
from services.control_plane.core.store import Store, migrate
from services.control_plane.jobs import jobs
from services.local.postgres import start_postgres, stop_postgres
from tests.services.control_plane.attempts.crashes import STEPS, Balancer, LivelyRay, Plane, environment
from tests.services.control_plane.conftest import API_KEY, pairs


class Service:
    """Several control planes on one database, behind one address."""

    def __init__(self, folder: Path, database_url: str, storage_url: str, ray: LivelyRay, *, planes: int) -> None:
        self.ray, self.database_url, self.balancer = ray, database_url, Balancer()
        settings = environment(database_url, storage_url, self.balancer)
        ray_url = f"http://127.0.0.1:{ray.server.server_port}"
        self.planes = [Plane(folder / f"home-{number}", settings, ray_url) for number in range(planes)]
        self.balancer.ports = [plane.port for plane in self.planes]

    def start(self) -> None:
        migrate(self.database_url)
        for plane in self.planes:
            plane.start()
        for plane in self.planes:
            plane.wait()

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.balancer.url}/v1", api_key=API_KEY, **options)

    def stop(self) -> None:
        for plane in self.planes:
            plane.kill()
        self.balancer.close()
        self.ray.server.shutdown()
        self.ray.server.server_close()


class Postgres:
    """A PostgreSQL server of this test, which can be frozen and restarted."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self.url = start_postgres(data)

    def freeze(self, seconds: float) -> None:
        server = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        processes = [server, *server.children(recursive=True)]
        for process in processes:
            process.suspend()
        time.sleep(seconds)
        for process in processes:
            process.resume()

    def stop_for(self, seconds: float) -> None:
        stop_postgres(self._data)
        time.sleep(seconds)
        start_postgres(self._data)


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with TemporaryDirectory(prefix="raydpo-tests-") as folder:
        data = Path(folder).resolve() / "postgres"
        yield Postgres(data)
        stop_postgres(data)


@pytest.fixture
def database_url(postgres: Postgres) -> str:
    return postgres.url


@pytest.fixture
def start(tmp_path: Path, database_url: str, storage_url: str) -> Iterator[Callable[..., Service]]:
    started: list[Service] = []

    def begin(*, planes: int = 2, step_seconds: float = 0.1) -> Service:
        service = Service(tmp_path, database_url, storage_url, LivelyRay(step_seconds=step_seconds), planes=planes)
        started.append(service)
        service.start()
        return service

    yield begin
    for service in started:
        service.stop()


def submit(client: openai.OpenAI, file_id: str, number: int) -> str:
    """Creates a job that differs from all others, and returns its id.

    A repeated request for a job could not be told from a request for a second equal job.
    """
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file_id,
        method={"type": "dpo"},
        metadata={"number": str(number)},
        extra_body={"x_raydpo": {"reference": {"source": "trainer"}}},
    )
    return job.id


def upload(service: Service) -> str:
    with service.client() as client:
        return client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id


def wait_until_ended(service: Service, count: int, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (ended := count_jobs(service, "observed IN ('succeeded', 'failed', 'cancelled')")) < count:
        assert time.monotonic() < deadline, f"{ended} of {count} jobs ended"
        time.sleep(0.5)


def count_jobs(service: Service, condition: str = "TRUE") -> int:
    with psycopg.connect(service.database_url) as connection:
        (count,) = connection.execute(f"SELECT count(*) FROM jobs WHERE {condition}").fetchone() or (0,)
    return int(count)


def check(service: Service, job_ids: list[str]) -> None:
    """Asserts that every job that a client was told about exists once, succeeded, and ran each step once."""
    assert len(set(job_ids)) == len(job_ids) == count_jobs(service)
    assert count_jobs(service, "observed <> 'succeeded'") == 0
    assert service.ray.doubled == []
    with psycopg.connect(service.database_url) as connection:
        told = connection.execute("SELECT job_id, array_agg(step ORDER BY id) FROM events WHERE step > 0 GROUP BY 1")
        assert dict(told.fetchall()) == {job_id: list(range(1, STEPS + 1)) for job_id in job_ids}
        ends = connection.execute("SELECT max(n) FROM (SELECT count(*) n FROM models GROUP BY job_id) counts")
        assert ends.fetchone() == (4,)  # three checkpoints and the policy
    assert asyncio.run(_replayed(service, job_ids)) == {"succeeded"}


async def _replayed(service: Service, job_ids: list[str]) -> set[str]:
    store = Store(service.database_url)
    async with store.begin() as session:
        states = {jobs.replay(await jobs.log_of(session, job_id))[1] for job_id in job_ids}
    await store.close()
    return states


def kill_at_random(service: Service, kills: int) -> None:
    """Kills random control planes one after the other. Each is back before the next is killed."""
    for _ in range(kills):  # while the other takes the requests
        time.sleep(random.uniform(0, 0.7))
        plane = random.choice(service.planes)
        plane.kill()
        plane.start()
        plane.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "count"), [(6, 10), pytest.param(200, 50, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
)
def test_whichever_control_plane_is_killed_clients_notice_nothing_and_every_job_succeeds_once(
    start: Callable[..., Service], kills: int, count: int
) -> None:
    service = start(step_seconds=0.1 if count < 50 else 2.0)
    file_id = upload(service)
    with ThreadPoolExecutor(4) as pool, service.client() as client:
        killing = pool.submit(kill_at_random, service, kills)
        submitting = [pool.submit(submit, client, file_id, number) for number in range(count)]
        job_ids = [each.result() for each in submitting]
        killing.result()
    wait_until_ended(service, count, seconds=400 if count < 50 else 900)
    check(service, job_ids)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(1200)])])
@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_a_database_that_is_away_for_a_while_costs_no_job(
    start: Callable[..., Service], postgres: Postgres, how: str, seconds: int
) -> None:
    service = start(planes=1, step_seconds=0.5)
    file_id = upload(service)
    with service.client(max_retries=10 + 2 * seconds) as client:
        early = [submit(client, file_id, number) for number in range(4)]
        with ThreadPoolExecutor(1) as pool:
            away = pool.submit(postgres.freeze if how == "frozen" else postgres.stop_for, seconds)
            late = [submit(client, file_id, 4 + number) for number in range(4)]
            away.result()
    wait_until_ended(service, 8, seconds=400)
    check(service, early + late)


@pytest.mark.long
def test_a_control_plane_that_is_frozen_beyond_its_lease_doubles_nothing(start: Callable[..., Service]) -> None:
    service = start(step_seconds=2.0)
    file_id = upload(service)
    with service.client() as client:
        job_ids = [submit(client, file_id, number) for number in range(6)]
    for plane in service.planes:  # whichever leads
        assert plane.process is not None
        plane.process.send_signal(signal.SIGSTOP)
        time.sleep(LEASE_SECONDS + 3)
        plane.process.send_signal(signal.SIGCONT)
    wait_until_ended(service, 6, seconds=400)
    check(service, job_ids)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_thousand_submissions_while_the_service_restarts_every_two_seconds(start: Callable[..., Service]) -> None:
    service = start()
    file_id = upload(service)
    stopped = threading.Event()

    def restart() -> None:
        for plane in itertools.cycle(service.planes):
            if stopped.wait(2):
                return
            plane.kill(signal.SIGTERM)
            plane.start()
            plane.wait()

    with ThreadPoolExecutor(9) as pool, service.client() as client:
        restarting = pool.submit(restart)
        job_ids = list(pool.map(lambda number: submit(client, file_id, number), range(1000)))
        stopped.set()
        restarting.result()
    assert len(set(job_ids)) == count_jobs(service) == 1000

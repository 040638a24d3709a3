"""Measures how much one hostile project slows down the nine ordinary projects of a service.

    python -m benchmarks.service.tenants --seconds 60

The ordinary projects submit jobs, ask for the jobs' status and receive webhooks, first alone and then beside the
hostile project. The hostile project fills the queue with jobs of the highest priority, pauses and resumes jobs, asks
for checks of files, has a hundred webhook endpoints that never answer, holds sockets open without reading or sending,
queries a model that never loads, lists all objects, and guesses keys. A stand-in replaces Ray; with the stand-in, each
job takes three seconds.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from services import storage
from services.contract import AttemptSpec, EventBatch, JobEvent, Succeeded
from services.local.postgres import start_postgres, stop_postgres
from tests.services.control_plane.conftest import FakeRay, pairs
from tests.services.receiver import Behaviour, Receiver
from tests.services.web import running

KEY = "rd-benchmark"
ORDINARY, TARPITS = 9, 100
JOB_SECONDS = 3.0
SUBMIT_SECONDS, STATUS_SECONDS = 6.0, 0.25  # seconds between two requests of one project
PREPARATION_SECONDS = 300.0  # the most for the endpoints and the large file of the hostile project
SETTINGS = {"max_running_jobs": 16, "requests_per_minute": 1200, "max_requests": 200, "stall_seconds": 5}
PROJECT_LIMITS = {"max_running_jobs": 4}  # without it, a project can fill the service with jobs that never end
DPO = {"type": "dpo"}


class Ray(FakeRay):
    """A stand-in for Ray. Jobs that it starts report success after JOB_SECONDS; models that it starts never load."""

    def __init__(self) -> None:
        super().__init__()
        self.resources = {"CPU": 1000.0}
        self.started: dict[str, float] = {}  # id of the job -> when its first attempt started
        self._client = httpx.Client(timeout=10)

    def get(self, path: str) -> tuple[int, Any]:
        status, answer = super().get(path)
        if path.startswith("/api/serve"):
            for application in answer["applications"].values():
                application["status"] = "DEPLOYING"
        return status, answer

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = super().post(path, body)
        if status == 200 and not path.endswith("/stop") and body["submission_id"].startswith("ftjob-"):
            self.started.setdefault(body["submission_id"].rsplit("-", 1)[0], time.time())
            threading.Timer(JOB_SECONDS, self._end, [body]).start()
        return status, answer

    def _end(self, body: dict[str, Any]) -> None:
        spec = AttemptSpec.model_validate_json(storage.read_bytes(shlex.split(body["entrypoint"])[-1]))
        report = Succeeded(model_uri=storage.join(spec.run_uri, "export"), trained_tokens=1)
        batch = EventBatch(events=[JobEvent(seq=0, created_at=time.time(), report=report)])
        headers = {"authorization": f"Bearer {body['runtime_env']['env_vars']['RAYDPO_ATTEMPT_TOKEN']}"}
        for _ in range(20):
            with suppress(httpx.HTTPError):
                answer = self._client.post(spec.events_url, json=batch.model_dump(mode="json"), headers=headers)
                if answer.status_code in (200, 409):
                    break
            time.sleep(0.5)
        self.jobs[body["submission_id"]] = "SUCCEEDED"


@dataclass
class Seen:
    """Measurements of the ordinary (not hostile) projects: the waiting times in seconds by kind of request, the counts
    of HTTP statuses, and the submitted jobs."""

    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: Counter[int] = field(default_factory=Counter)
    jobs: dict[str, float] = field(default_factory=dict)  # id of the job -> when the job was submitted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=int, default=60, help="Duration of each of the two measurements. Default: %(default)s."
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raydpo-tenants-") as folder, ExitStack() as stops:
        os.chmod(folder, 0o755)
        home = Path(folder).resolve()
        stops.callback(stop_postgres, home / "postgres")
        database_url = start_postgres(home / "postgres")
        ray, receiver = Ray(), stops.enter_context(running(Receiver()))
        stops.callback(ray.server.shutdown)
        stops.callback(receiver.stopping.set)
        for number in range(TARPITS):
            receiver.paths[f"/tarpit-{number}"] = Behaviour(pause_seconds=60)
        url = start(home, database_url, ray, receiver, stops)
        projects = [new_project(url, f"ordinary-{number}", receiver.url) for number in range(ORDINARY)]
        hostile = new_project(url, "hostile", receiver.url)
        print(f"{'':10} {'':10} {'number':>7} {'p50 s':>8} {'p99 s':>8}")
        alone = measure("alone", url, projects, ray, receiver, options.seconds)
        spawn = multiprocessing.get_context("spawn")
        attacks = spawn.Event()
        process = spawn.Process(target=be_hostile, args=(url, *hostile, receiver.url, attacks))
        process.start()
        stops.callback(process.join)
        stops.callback(process.kill)
        attacks.wait(PREPARATION_SECONDS)
        time.sleep(10)
        beside = measure("beside", url, projects, ray, receiver, options.seconds)
        if not (attacks.is_set() and process.is_alive()):
            raise SystemExit("The hostile project did not attack all the time, so the figures beside it say nothing.")
        for name, quantiles in alone.items():
            print(
                f"{name:10} {'ratio':10} {'':7}"
                + "".join(f" {b / a:8.2f}" for a, b in zip(quantiles, beside[name], strict=True))
            )


def start(home: Path, database_url: str, ray: Ray, receiver: Receiver, stops: ExitStack) -> str:
    """Starts a control plane and returns the base URL of its API. The control plane uses the database at
    `database_url`, the stand-in `ray`, and a folder in `home`; it may send webhooks to `receiver`. `stops` ends it."""
    settings = {f"RAYDPO_{name.upper()}": str(value) for name, value in SETTINGS.items()}
    environment = (
        os.environ
        | settings
        | {
            "DATABASE_URL": database_url,
            "RAYDPO_API_KEY": KEY,
            "RAYDPO_HOME": str(home / "home"),
            "RAYDPO_STORAGE_URL": (home / "storage").as_uri(),
            "RAYDPO_WEBHOOK_URLS": json.dumps([f"{receiver.url}/"]),
            "PYTHONPATH": os.getcwd(),
        }
    )
    up = ["up", "--port=0", f"--ray-address=http://127.0.0.1:{ray.server.server_port}", "--model=tiny=hub/tiny"]
    command = [sys.executable, "-c", "from services.cli.app import app; app()", *up]
    process = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    stops.callback(process.wait, 60)
    stops.callback(process.terminate)
    return str(process.stdout.readline().split()[-1])


def new_project(url: str, name: str, receiver_url: str) -> tuple[str, str, str]:
    """Creates a project with a key, a webhook endpoint at `receiver_url`, and a file. Returns the project's name, the
    key and the file's id."""
    with httpx.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=60) as admin:
        project = admin.post(f"{url}/x/projects", json={"name": name} | PROJECT_LIMITS).json()["id"]
        scopes = ["read", "write", "inference", "admin"]
        made = admin.post(f"{url}/x/keys", json={"name": "k", "project_id": project, "scopes": scopes}).json()
    with httpx.Client(headers={"authorization": f"Bearer {made['value']}"}, timeout=60) as client:
        hook = {"name": "n", "url": f"{receiver_url}/{name}", "event_types": ["fine_tuning.job.succeeded"]}
        client.post(f"{url}/webhook_endpoints", json=hook).raise_for_status()
        upload = {"files": {"file": ("p.jsonl", pairs())}, "data": {"purpose": "fine-tune"}}
        return name, str(made["value"]), str(client.post(f"{url}/files", **upload).json()["id"])


# --- the ordinary projects -----------------------------------------------------------------------


def measure(
    what: str, url: str, projects: list[tuple[str, str, str]], ray: Ray, receiver: Receiver, seconds: float
) -> dict[str, list[float]]:
    """Lets the ordinary (not hostile) projects use the service for `seconds`. Returns the median and the 99th
    percentile of their waiting times, for each kind of request. `what` names the measurement in the output."""
    # A process of its own, so that the threads of the stand-ins do not slow the measurements down.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        seen = apart.submit(work, url, projects, seconds).result()
    time.sleep(10)  # so that the last jobs can end
    notified = {json.loads(m.body)["data"]["id"] for m in receiver.received if m.path.startswith("/ordinary")}
    seen.seconds["start"] = [ray.started[job] - at for job, at in seen.jobs.items() if job in ray.started]
    by_request = {name: quantiles(values) for name, values in seen.seconds.items()}
    for name, values in seen.seconds.items():
        print(f"{name:10} {what:10} {len(values):7} {by_request[name][0]:8.3f} {by_request[name][1]:8.3f}")
    delivered = sum(job in notified for job in seen.jobs)
    print(f"{'webhooks':10} {what:10} {delivered:7} of {len(seen.jobs)} jobs; answers: {dict(seen.statuses)}")
    return by_request


def quantiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [float("nan")] * 2
    cuts = statistics.quantiles(values, n=100)
    return [cuts[49], cuts[98]]


def work(url: str, projects: list[tuple[str, str, str]], seconds: float) -> Seen:
    seen = Seen()

    async def all_at_once() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                for _, key, file in projects:
                    group.create_task(use(url, key, file, seen))

    asyncio.run(all_at_once())
    return seen


async def use(url: str, key: str, file: str, seen: Seen) -> None:
    """Submits a job of one project every SUBMIT_SECONDS, and asks for the job's status in between. Adds the waiting
    times, HTTP statuses and jobs to `seen`."""
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, timeout=60) as client:

        async def ask(name: str, method: str, path: str, **options: Any) -> httpx.Response:
            began = time.monotonic()
            answer = await client.request(method, url + path, **options)
            seen.seconds[name].append(time.monotonic() - began)
            seen.statuses[answer.status_code] += 1
            return answer

        await asyncio.sleep(random.uniform(0, SUBMIT_SECONDS))
        while True:
            submitted, body = time.time(), {"model": "tiny", "training_file": file, "method": DPO}
            answer = await ask("submit", "POST", "/fine_tuning/jobs", json=body)
            if answer.status_code != 200:
                await asyncio.sleep(1)
                continue
            job = answer.json()["id"]
            seen.jobs[job] = submitted
            while time.time() < submitted + SUBMIT_SECONDS:
                await ask("status", "GET", f"/fine_tuning/jobs/{job}")
                await asyncio.sleep(STATUS_SECONDS)


# --- the hostile project -------------------------------------------------------------------------


def be_hostile(url: str, name: str, key: str, file: str, receiver_url: str, attacks: Event) -> None:
    """Attacks the service with all kinds of requests at the same time, until this process is killed. The requests have
    the key of the hostile project; its webhook endpoints are at `receiver_url`.

    Sets `attacks` when the preparations are done. A real attacker has cores of its own. This process has the lowest
    priority, so that it takes only CPU time that other processes leave.
    """
    os.nice(19)
    asyncio.run(Hostile(url, key, file, receiver_url).run(attacks))


class Hostile:
    """Sends the requests of the hostile project, which tries to slow down the other projects of the service."""

    def __init__(self, url: str, key: str, file: str, receiver_url: str) -> None:
        self._url, self._file, self._receiver_url = url, file, receiver_url
        self._key = {"authorization": f"Bearer {key}"}
        self._client = httpx.AsyncClient(headers=self._key, timeout=60, limits=httpx.Limits(max_connections=None))

    async def run(self, attacks: Event) -> None:
        for number in range(TARPITS - 1):
            hook = {"name": "n", "url": f"{self._receiver_url}/tarpit-{number}"}
            events = {"event_types": ["fine_tuning.job.succeeded", "fine_tuning.job.cancelled"]}
            await self._client.post(f"{self._url}/webhook_endpoints", json=hook | events)
        rows = {"files": {"file": ("p.jsonl", pairs(100_000))}, "data": {"purpose": "fine-tune"}}
        upload = self._client.post(f"{self._url}/files", **rows, timeout=PREPARATION_SECONDS)
        large = (await upload).json()["id"]
        content = f"GET /v1/files/{large}/content HTTP/1.1\r\n"
        drip = "POST /v1/fine_tuning/jobs HTTP/1.1\r\ncontent-length: 100000\r\ncontent-type: application/json\r\n"
        attacks.set()
        lists = itertools.cycle(("/models", "/files?limit=10000", "/fine_tuning/jobs?limit=100"))
        async with asyncio.TaskGroup() as group:
            for times, deed in (
                (4, self._submit),
                (2, self._check),
                (60, self._complete),
                (2, lambda: self._client.get(self._url + next(lists))),
                (20, lambda: self._hold(content, self._key)),
                (60, lambda: self._hold(drip, self._key)),
                (60, lambda: self._hold(drip, {"authorization": f"Bearer rd-{random.random()}"})),
                (4, self._guess),
            ):
                for _ in range(times):
                    group.create_task(again(deed))

    async def _submit(self) -> None:
        body = {"model": "tiny", "training_file": self._file, "method": DPO, "x_raydpo": {"priority": 10}}
        answer = await self._client.post(f"{self._url}/fine_tuning/jobs", json=body)
        for wish in random.choice((["cancel"], ["pause"], ["pause", "resume"], [], [])):
            await self._client.post(f"{self._url}/fine_tuning/jobs/{answer.json()['id']}/{wish}")

    async def _check(self) -> None:
        body = {"training_file": self._file, "model": "tiny", "max_length": random.randrange(64, 10**6)}
        await self._client.post(f"{self._url}/x/datasets/check", json=body)

    async def _complete(self) -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
        await self._client.post(f"{self._url}/chat/completions", json=body)

    async def _guess(self) -> None:
        await self._client.get(f"{self._url}/models", headers={"authorization": f"Bearer rd-{random.random()}"})

    async def _hold(self, head: str, headers: dict[str, str]) -> None:
        """Opens a connection, sends the beginning of a request (`head`, and the API key in `headers`), and then neither
        reads nor writes for 30 seconds."""
        split = urlsplit(self._url)
        _, writer = await asyncio.open_connection(split.hostname, split.port, limit=1)
        writer.transport.pause_reading()
        writer.write(f"{head}host: a\r\nauthorization: {headers['authorization']}\r\n\r\n".encode())
        await asyncio.sleep(30)
        writer.transport.abort()


async def again(deed: Callable[[], Awaitable[Any]]) -> None:
    while True:
        with suppress(httpx.HTTPError, OSError, KeyError):
            await deed()
        await asyncio.sleep(1)


if __name__ == "__main__":
    main()

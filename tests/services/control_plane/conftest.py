"""Runs the control plane in this process on a real database, without a Ray cluster: nothing answers at its address."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import certifi
import httpx
import openai
import pytest

from services import storage
from services.control_plane.app import create_app
from services.control_plane.attempts.reconciler import Reconciler
from services.control_plane.core.store import migrate
from services.control_plane.http.server import Server
from services.control_plane.settings import Settings
from tests.clients import strict
from tests.services.forks import Fork
from tests.services.receiver import Receiver
from tests.services.web import running

API_KEY = "rd-a-key-for-tests"
EVENT_TYPES = SUCCEEDED, FAILED, CANCELLED = [f"fine_tuning.job.{end}" for end in ("succeeded", "failed", "cancelled")]


@pytest.fixture(scope="module", autouse=True)
def one_certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets every HTTP client read only one certificate. Reading all of them takes 60 ms for each client."""
    file = tmp_path_factory.mktemp("certificates") / "one.pem"
    first, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
    file.write_text(first + end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(file))
        yield


def wait_for(done: Callable[[], Any], seconds: float = 300) -> None:
    """Waits until `done` returns a true value. Fails after `seconds`, which only guard against hanging."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pair(number: int) -> bytes:
    row = {
        "input": {"messages": [{"role": "user", "content": f"What is {number} plus 1?"}]},
        "preferred_output": [{"role": "assistant", "content": f"It is {number + 1}."}],
        "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
    }
    return json.dumps(row).encode()


def pairs(count: int = 12) -> bytes:
    return b"\n".join(pair(number) for number in range(count)) + b"\n"


class FakeRay:
    """A stand-in for the REST APIs of Ray Jobs and Ray Serve. It runs nothing: a test sets the status of each job."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.told: dict[str, dict[str, Any]] = {}  # of jobs: what Ray tells beside their status
        self.asked: list[str] = []  # paths
        self.submissions: list[dict[str, Any]] = []
        self.serve: dict[str, dict[str, Any]] = {}  # its applications, as Serve tells of them
        self.target_capacity: float | None = None
        self.resources = {"CPU": 8.0}
        self.machines: list[dict[str, Any]] = []  # as their agents tell of them
        self.lose_answers = False
        self.down = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.asked.append(self.path)
                self._answer(*fake.get(self.path))

            def do_POST(self) -> None:
                self._answer(*fake.post(self.path, self._body()))

            def do_PUT(self) -> None:
                fake.deploy(self._body())
                self._answer(200, "")

            def _body(self) -> Any:
                return json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")

            def _answer(self, status: int, body: Any) -> None:
                status = 500 if fake.down else status
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}).start()

    @property
    def applications(self) -> list[str]:
        return list(self.serve)

    def deploy(self, body: dict[str, Any]) -> None:
        """Sets the applications as a PUT to Ray Serve does. Applications of an earlier PUT that are missing are
        removed."""
        kept = {name: app for name, app in self.serve.items() if app["source"] != "declarative"}
        self.serve = kept | {config["name"]: served(config) for config in body["applications"]}
        self.target_capacity = body.get("target_capacity")

    def get(self, path: str) -> tuple[int, Any]:
        if path.startswith("/api/serve"):
            told = {"http_options": {"port": 8000}, "target_capacity": self.target_capacity}
            return 200, {"applications": self.serve} | {key: value for key, value in told.items() if value}
        if path == "/api/v0/nodes":
            return 200, {"data": {"result": {"result": [{"state": "ALIVE", "resources_total": self.resources}]}}}
        if path.startswith("/nodes"):
            return 200, {"data": {"summary": [{"raylet": {"state": "ALIVE"}} | machine for machine in self.machines]}}
        if path == "/api/jobs/":
            return 200, [self._job(name) for name in self.jobs]
        name = path.rsplit("/", 1)[-1]
        if name not in self.jobs:
            return 404, f"Job {name} does not exist"
        return 200, self._job(name)

    def _job(self, name: str) -> dict[str, Any]:
        return {"submission_id": name, "status": self.jobs[name]} | self.told.get(name, {})

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path.endswith("/stop"):
            self.jobs[path.split("/")[-2]] = "STOPPED"
            return 200, {"stopped": True}
        if body["submission_id"] in self.jobs:
            return 400, "already exists"
        self.jobs[body["submission_id"]] = "RUNNING"
        self.submissions.append(body)
        return (500, "lost") if self.lose_answers else (200, {})


def served(config: dict[str, Any] | None, source: str = "declarative", status: str = "RUNNING") -> dict[str, Any]:
    """Returns what Ray Serve reports about an application."""
    told = {"status": status, "message": "", "deployments": {}, "source": source}
    return told | ({"deployed_app_config": config} if config else {})


@pytest.fixture(scope="module")
def fake_ray() -> Iterator[FakeRay]:
    fake = FakeRay()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture(scope="module")
def storage_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.config.getoption("--storage") == "s3":
        return str(request.getfixturevalue("s3_server").new_folder())
    return (tmp_path_factory.mktemp("home") / "storage").as_uri()


@pytest.fixture(scope="module")
def offline(database_url: str, storage_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    home = Path(tmp_path_factory.mktemp("home"))
    with socket.socket() as silent:  # its port is taken, so that no other test's Ray listens there
        silent.bind(("127.0.0.1", 0))
        yield Settings(
            home=home,
            DATABASE_URL=database_url,
            storage_url=storage_url,
            api_key=API_KEY,
            advertised_url="http://127.0.0.1:9",
            ray_url=f"http://127.0.0.1:{silent.getsockname()[1]}",
            models={"tiny": "/nowhere/tiny"},
            model_wait_seconds=0.2,
            dataset_uris=["https://", "hf://datasets/", "s3://bucket/rows/", f"{home.as_uri()}/data/"],
        )


@pytest.fixture(scope="module")
def settings(offline: Settings) -> Settings:
    return offline


@pytest.fixture(scope="module")
def no_cleanup() -> Iterator[None]:
    """Keeps control planes in this process from cleaning up by themselves, so that a test knows who does what."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reconciler, "_sweep", lambda _: None)
        yield


@contextmanager
def answering(settings: Settings) -> Iterator[str]:
    """Runs the control plane in this process, and yields its URL."""
    migrate(settings.database_direct_url or settings.database_url)
    port = free_port()
    app = create_app(settings)
    server = Server(app, host="127.0.0.1", port=port, log_level="warning")
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def base_url(settings: Settings) -> Iterator[str]:
    with answering(settings) as url:
        yield url


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """Runs a receiver of webhooks."""
    with running(Receiver()) as receiver:
        yield receiver
        receiver.stopping.set()


SERVER = """
import sys
from services.control_plane.files import row_check
from services import storage
from services.control_plane.app import create_app
from services.control_plane.http.server import Server
from services.control_plane.settings import Settings
row_check.AT_ONCE_BYTES = int(sys.argv[2])
Server(create_app(Settings()), port=int(sys.argv[1]), log_level="error").run()
"""


@contextmanager
def serving(settings: Settings, at_once_bytes: int = 2**29, **more: str) -> Iterator[tuple[Fork, str]]:
    """Runs the control plane in a separate process, which can be killed, and yields the process and its URL.

    `more` are further environment variables.
    """
    names = ("home", "storage_url", "advertised_url", "ray_url")
    environment = {f"RAYDPO_{name.upper()}": str(getattr(settings, name)) for name in names}
    environment |= {"RAYDPO_MODELS": '{"tiny": "/nowhere/tiny"}', "RAYDPO_API_KEY": API_KEY}
    environment |= {"DATABASE_URL": settings.database_url, "PYTHONPATH": str(Path(__file__).parents[3])}
    environment |= more
    port = free_port()
    process = Fork(SERVER, str(port), str(at_once_bytes), env=os.environ | environment)
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        assert process.poll() is None
        time.sleep(0.1)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with strict.OpenAI(base_url=f"{base_url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client


def api_of(base_url: str, key: str) -> httpx.Client:
    """Returns an HTTP client of the API, for routes that OpenAI's client does not have."""
    return httpx.Client(base_url=f"{base_url}/v1", headers={"Authorization": f"Bearer {key}"}, timeout=300)


@pytest.fixture(scope="module")
def api(base_url: str) -> Iterator[httpx.Client]:
    with api_of(base_url, API_KEY) as api:
        yield api


def stored(settings: Settings, *folder: str) -> list[str]:
    """Returns the names of the files in a folder of the service's storage."""
    return sorted(name for name, _ in storage.list_ages(storage.join(settings.storage_url, *folder)))


def new_project(api: httpx.Client, name: str, **limits: Any) -> str:
    answer = api.post("/x/projects", json={"name": name, **limits})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def new_key(api: httpx.Client, **wanted: Any) -> dict[str, Any]:
    answer = api.post("/x/keys", json={"name": "test", **wanted})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


EVERY_SCOPE = ["read", "write", "inference", "admin"]

"""Runs the whole service as a user does, with `raydpo up`, a new home folder, and a small base model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import openai
import psutil
import pytest

from demo.base_model import make_base_model
from demo.rows import Shop
from tests.clients import strict
from tests.services.control_plane.conftest import free_port

START_SECONDS = 600.0


def wait_for(condition: Callable[[], Any], what: str, *, seconds: float = 900.0) -> Any:
    """Calls `condition` until it returns something true, and returns this value. Fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")


class Service:
    """Runs `raydpo up` in a process, which can be killed and started again on the same home folder.

    `runner` is a command that replaces itself with the command that follows it, such as `env`.
    """

    def __init__(
        self, home: Path, models: Mapping[str, Path], environment: Mapping[str, str], runner: Sequence[str] = ()
    ) -> None:
        self.home, self.models, self.environment, self.runner = home, models, environment, runner
        self.port, self.hooks_port = free_port(), free_port()
        self.log = home.parent / "up.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        raydpo = Path(sys.executable).with_name("raydpo")
        models = [f"--model={name}={folder}" for name, folder in self.models.items()]
        command = [*self.runner, raydpo, "up", f"--home={self.home}", f"--port={self.port}", *models]
        hooks = {"RAYDPO_WEBHOOK_URLS": json.dumps([f"http://127.0.0.1:{self.hooks_port}/"])}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | hooks | self.environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self._is_ready, f"ready, see {self.log}", seconds=START_SECONDS)

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/readyz").is_success
        except httpx.TransportError:
            return False

    @property
    def key(self) -> str:
        return (self.home / "api.key").read_text()

    def kill(self) -> None:
        """Kills the service without time to clean up, as a crash would."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """Asks the service to stop, as Ctrl-C or Kubernetes would."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)

    def client(self) -> openai.OpenAI:
        return strict.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=5)

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Returns every process that belongs to this home, which its command line or environment names."""
        return [process for process in psutil.process_iter() if self._is_ours(process, word)]

    def _is_ours(self, process: psutil.Process, word: str) -> bool:
        try:
            command, environment = process.cmdline(), process.environ()
        except (psutil.Error, OSError):
            return False
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        ours = str(self.home) in " ".join([*command, *environment.values()])
        return ours and word in " ".join(command)


@contextmanager
def running_service(
    make_models: Callable[[Path], Mapping[str, Path]], *, runner: Sequence[str] = (), **environment: str
) -> Iterator[Service]:
    """Starts a service on a new home folder, with the base models that `make_models` writes into a folder."""
    # Not in pytest's folder: as root, PostgreSQL is another user and must be able to reach its data.
    with TemporaryDirectory(prefix="raydpo-e2e-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        service = Service(Path(folder) / "home", make_models(Path(folder)), environment, runner)
        service.start()
        try:
            yield service
        finally:
            if service.process and service.process.poll() is None:
                service.stop()


def tiny_model(folder: Path, *, hidden_size: int = 64, num_layers: int = 2) -> Path:
    """Writes a small Llama whose tokenizer knows the words of the demo shop, and returns its folder."""
    text = [f"{prompt} {answer}" for prompt, answer in Shop(num_things=8, num_held_out=8).demonstrations(500)]
    make_base_model(folder, text, hidden_size=hidden_size, num_layers=num_layers)
    return folder


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(lambda folder: {"tiny": tiny_model(folder / "tiny")}) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with service.client() as client:
        yield client

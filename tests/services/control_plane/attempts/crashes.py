"""Provides what the crash tests need: a stand-in for Ray, control planes that can be killed, and a load balancer."""

import asyncio
import os
import random
import shlex
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from dpo_core.config import TrainConfig
from services import storage
from services.contract import AttemptSpec, CheckpointSaved, Paused, Started, StepMetrics, Succeeded
from services.training.reports.reporting import Reporter
from tests.services.control_plane.conftest import API_KEY, FakeRay, free_port
from tests.services.forks import Fork
from tests.services.proxy import Proxy, Streams

STEPS = 12


class LivelyRay(FakeRay):
    """A stand-in for Ray whose attempts run as threads and send reports with the real Reporter.

    The first attempt of some jobs dies half way. An attempt is one run of a job.
    """

    def __init__(self, *, step_seconds: float, dying: float = 0.3, steps: int = STEPS) -> None:
        super().__init__()
        self._step_seconds, self._dying, self._steps = step_seconds, dying, steps
        self._saved: Counter[str] = Counter()  # the last checkpoint's step, by job
        self._lock = threading.Lock()
        self.doubled: list[str] = []  # submissions that began while another attempt of their job lived

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            status, answer = super().post(path, body)
            if path.endswith("/stop") or status == 400:
                return status, answer
            submission_id = body["submission_id"]
            job_id = submission_id.rsplit("-", 1)[0]
            if any(name != submission_id and self._lives(name, job_id) for name in self.jobs):
                self.doubled.append(submission_id)
        uri = shlex.split(body["entrypoint"])[-1]
        token = body["runtime_env"]["env_vars"]["RAYDPO_ATTEMPT_TOKEN"]
        threading.Thread(target=self._run, args=(submission_id, uri, token), daemon=True).start()
        return status, answer

    def steps(self, config: TrainConfig) -> int:
        return self._steps

    def metrics(self, step: int) -> dict[str, float]:
        return {"loss": 1 / step}

    def _lives(self, name: str, job_id: str) -> bool:
        return name.startswith(f"{job_id}-") and self.jobs[name] == "RUNNING"

    def _run(self, submission_id: str, uri: str, token: str) -> None:
        spec = AttemptSpec.model_validate_json(storage.read_bytes(uri))
        reporter = Reporter(spec, token, period_seconds=0.1)
        config = spec.config.resolved(12)
        steps = self.steps(config)
        dies_at = random.randrange(1, steps) if spec.attempt == 1 and random.random() < self._dying else None
        first = self._saved[spec.job_id] + 1
        reporter.report(Started(config=config, num_groups=12, total_steps=steps, resumed_from=first - 1))
        for step in range(first, steps + 1):
            time.sleep(self._step_seconds * random.uniform(0.5, 1.5))
            command = reporter.command()
            if self.jobs[submission_id] != "RUNNING" or command == "fenced":
                return
            if command == "pause":
                self._save(spec, reporter, step - 1)
                reporter.report(Paused(step=step - 1))
                break
            if step == dies_at:
                self.jobs[submission_id] = "FAILED"
                return
            reporter.report(StepMetrics(step=step, total_steps=steps, metrics=self.metrics(step)))
            if step % 4 == 0:
                self._save(spec, reporter, step)
        else:
            reporter.report(Succeeded(model_uri=storage.join(spec.run_uri, "export"), trained_tokens=steps))
        reporter.close(1.0)
        self.jobs[submission_id] = "SUCCEEDED"

    def _save(self, spec: AttemptSpec, reporter: Reporter, step: int) -> None:
        if step <= self._saved[spec.job_id]:
            return
        reporter.flush()
        self._saved[spec.job_id] = step
        saved = storage.join(spec.run_uri, "checkpoints", f"step-{step:06d}")
        reporter.report(CheckpointSaved(step=step, uri=saved, metrics={"loss": 1 / step}))


class Plane:
    """A control plane in a separate process, which can be killed."""

    def __init__(self, home: Path, environment: dict[str, str], ray_url: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._ray_url = ray_url
        self.log = home / "up.log"
        home.mkdir()
        self._environment = os.environ | environment | {"RAYDPO_HOME": str(home), "PYTHONPATH": os.getcwd()}
        self.process: Fork | None = None

    def start(self) -> None:
        arguments = ["up", f"--port={self.port}", f"--ray-address={self._ray_url}", "--model=tiny=hub/tiny"]
        self.process = Fork("from services.cli.app import app; app()", *arguments, env=self._environment, log=self.log)

    def wait(self) -> None:
        deadline = time.monotonic() + 300
        while not self.is_ready():
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False, timeout=5).is_success
        except httpx.TransportError:
            return False

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(120)


class Balancer(Proxy):
    """Passes each connection on to a control plane that accepts it, as a Service of Kubernetes does."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        super().__init__()

    async def _connect(self) -> Streams | None:
        for port in random.sample(self.ports, len(self.ports)):
            with suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", port)
        return None


def environment(database_url: str, storage_url: str, balancer: Balancer) -> dict[str, str]:
    return {
        "DATABASE_URL": database_url,
        "RAYDPO_API_KEY": API_KEY,
        "RAYDPO_STORAGE_URL": storage_url,
        "RAYDPO_ADVERTISED_URL": balancer.url,
        "RAYDPO_MAX_RUNNING_JOBS": "8",
    }

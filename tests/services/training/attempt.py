"""Starts the driver of an attempt (one run of a job) as Ray Jobs does, and reads its reports."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import psutil

from services import spool, storage
from services.contract import (
    AttemptSpec,
    Report,
    StepMetrics,
)


class Driver:
    def __init__(
        self, spec: AttemptSpec, environment: dict[str, str], token: str, program: str = "services.training.driver"
    ) -> None:
        uri = storage.join(spec.run_uri, "attempts", f"{spec.attempt}.json")
        storage.write_bytes(uri, spec.model_dump_json().encode())
        self.spec = spec
        self.log = storage.fetch(spec.run_uri) / f"{spec.attempt}.log"
        command = [sys.executable, "-m", "services.forkserver.client", "--wait", "-m", program, uri]
        environment = environment | {"RAYDPO_ATTEMPT_TOKEN": token}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def wait(self, seconds: float = 1500) -> int:
        return self.process.wait(seconds)

    def fork(self) -> psutil.Process:
        """Returns the process that runs the job's program. `process` is only the client that had it started as a
        fork."""
        (fork,) = filter(self._prints_here, psutil.process_iter(["cmdline"]))
        return fork

    def _prints_here(self, process: psutil.Process) -> bool:
        if "services.forkserver.server" not in (process.info["cmdline"] or ()):
            return False
        try:
            return os.readlink(f"/proc/{process.pid}/fd/1") == str(self.log)
        except OSError:  # it has ended
            return False

    def reports(self) -> list[Report]:
        segments = spool.segments(self.spec.run_uri, self.spec.attempt)
        events = [event for _, uri in segments for event in spool.read(uri).events]
        assert [event.seq for event in events] == list(range(len(events)))
        return [event.report for event in events]

    def printed(self, words: str, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.1)

    def reported(self, kind: type[Report], seconds: float = 900, count: int = 1) -> None:
        deadline = time.monotonic() + seconds
        while len(only(kind, self.reports())) < count:
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.05)


def only(kind: Any, reports: list[Report]) -> list[Any]:
    return [report for report in reports if isinstance(report, kind)]


def figures(reports: list[Report]) -> dict[int, dict[str, float]]:
    """Returns the metrics of each step in the reports, without the metrics that depend on the clock."""
    steps, clock = only(StepMetrics, reports), ("tokens_per_second", "hfu")
    return {s.step: {key: s.metrics[key] for key in s.metrics if key not in clock} for s in steps}


def ray_processes(name: str, ray_environment: dict[str, str]) -> list[psutil.Process]:
    """Returns the processes with this name that belong to this module's own Ray cluster."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):  # it ends just now
            if not process.name().startswith(name) or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get("RAY_AUTH_TOKEN") == ray_environment["RAY_AUTH_TOKEN"]:
                found.append(process)
    return found


def train_workers(ray_environment: dict[str, str]) -> list[psutil.Process]:
    return ray_processes("ray::RayTrainWo", ray_environment)

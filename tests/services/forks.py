"""Starts processes fast, as forks of a process that has already imported the control plane."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

IMPORTED = [
    "services.cli.app",
    "services.cli.service.up",
    "services.control_plane.app",
    "services.control_plane.http.server",
]
FORKS = multiprocessing.get_context("forkserver")


class Fork:
    """A process that runs a program as a fork, with the methods of subprocess.Popen that tests use.

    The program's output goes to the file `log`, if one is given.
    """

    def __init__(self, program: str, *arguments: str, env: dict[str, str], log: Path | None = None) -> None:
        FORKS.set_forkserver_preload(IMPORTED)
        # The end of pytest kills a daemon that a test left, and waits for no other process.
        self._process = FORKS.Process(target=_run, args=(program, arguments, env, log), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(program: str, arguments: tuple[str, ...], env: dict[str, str], log: Path | None) -> None:
    os.environ.clear()
    os.environ.update(env)
    if log is not None:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    sys.argv = ["-c", *arguments]
    exec(program, {"__name__": "__main__"})

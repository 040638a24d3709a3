"""Runs a Python command in a fork of a server: `python -m services.forkserver.client [--wait] <script | -m module> …`.

Ray's workers, and processes that a worker spawns with `multiprocessing`, run on the server of their job. A command
with `--wait` runs on a server, too. The client runs every other command itself.

For spawned processes and commands with `--wait`, the client waits: it forwards SIGTERM and SIGINT and ends with the
exit status, and if it is killed, the server kills the fork. For a worker it does not wait, because the worker itself
tells Ray its process id.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from services.forkserver import JOB_VARIABLE, VARIABLE, is_alive, launcher_of

# A worker with its own environment starts with the second, which then runs the first.
RAY_WORKERS = ("default_worker.py", "setup_worker.py")
SPAWNED = "--multiprocessing-fork"
RAY = "services.forkserver.loaded_ray"
# Drivers have their own server, which imports these before the first driver starts.
DRIVER = "services.training.driver"
DRIVERS_IMPORT = (RAY, DRIVER, "services.training.run.ray_trainer", "services.training.run.worker")
START_SECONDS = 60.0
IDLE_SECONDS = 60.0  # from the end of a job's last fork to the end of its server


@dataclass
class Launch:
    """A command to run in a fork, the server that forks, and whether the client waits."""

    command: list[str]  # a script, -m and a module, or -c and a program; then arguments
    server: str | None = None  # its name; None: the first server
    modules: Sequence[str] = ()  # that the server imports before it answers
    idle_seconds: float | None = None  # after which the server ends
    waits: bool = False


def main(arguments: list[str]) -> int:
    """Runs the command on a server and returns its exit status, or replaces this process with the command."""
    path = os.environ.get(VARIABLE)
    launch = _launch_of(arguments)
    if path and launch:
        try:
            pid, answers = _fork(path, launch)
        except OSError as error:
            sys.stderr.write(f"The fork server does not answer ({error}); this process does all imports itself.\n")
            sys.stderr.flush()
        else:
            return _wait_for(pid, answers) if launch.waits else 0
    command = arguments[1:] if arguments[:1] == ["--wait"] else arguments
    return os.execv(sys.executable, [sys.executable, *command])


def _launch_of(arguments: list[str]) -> Launch | None:
    """Returns how a server runs the command. None: this process runs it."""
    if arguments[:1] == ["--wait"]:
        command = arguments[1:]
        if command[:2] == ["-m", DRIVER]:
            return Launch(command, DRIVER, DRIVERS_IMPORT, waits=True)
        return Launch(command, waits=True)
    job = os.environ.get(JOB_VARIABLE)
    if SPAWNED in arguments:  # after options of Python, which the server has already
        return Launch(arguments[arguments.index("-c") :], job, (RAY,), IDLE_SECONDS, waits=True)
    if Path(arguments[0]).name in RAY_WORKERS:
        return Launch(arguments, job, (RAY,), IDLE_SECONDS)
    return None


def _fork(path: str, launch: Launch) -> tuple[int, TextIO]:
    """Returns the process id of the fork and a file whose next line is its exit status. Raises OSError."""
    descriptors = _inherited()
    if launch.server is None:
        return _request_fork(path, launch, descriptors)
    server_path = f"{path}.{launch.server}"
    try:
        return _request_fork(server_path, launch, descriptors)
    except OSError:  # the server was not started yet, or has just ended
        _start_server(path, launch.server, launch.modules, launch.idle_seconds)
        return _request_fork(server_path, launch, descriptors)


def _inherited() -> list[int]:
    """Returns the numbers of the open files that a program started from here would inherit."""
    inherited = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the descriptor of this listing
            if os.get_inheritable(number):
                inherited.append(number)
    return sorted(inherited)


def _request_fork(path: str, launch: Launch, descriptors: Sequence[int]) -> tuple[int, TextIO]:
    """Asks the server at `path` for a fork. Returns its process id and the file of further answers. Raises OSError."""
    request = {
        "command": launch.command,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "group": os.getpgrp(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "waits": launch.waits,
        "descriptors": descriptors,
    }
    answers = _send(path, request, descriptors)
    return _read_pid(answers), answers


def _read_pid(answers: TextIO) -> int:
    pid = answers.readline()
    if not pid:
        raise ConnectionError("it ended")
    return int(pid)


def _send(path: str, request: dict[str, Any], descriptors: Sequence[int] = ()) -> TextIO:
    """Sends a request, and returns the file from which its answers can be read."""
    body = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [len(body).to_bytes(4, "big")], descriptors)
        connection.sendall(body)
        return connection.makefile()  # keeps the connection


def prepare_drivers(path: str) -> None:
    """Starts the drivers' server, which does their imports. Returns at once. Raises OSError."""
    _send(path, _server_request(path, DRIVER, DRIVERS_IMPORT))


def _start_server(path: str, name: str, modules: Sequence[str], idle_seconds: float | None = None) -> None:
    """Starts a server at `<path>.<name>`, a fork of the first, unless it runs already. Returns when it listens.

    It answers when it has imported the modules. Raises OSError.
    """
    pid = _read_pid(_send(path, _server_request(path, name, modules, idle_seconds)))
    _wait_until_listening(f"{path}.{name}", lambda: is_alive(pid))


def _server_request(path: str, name: str, modules: Sequence[str], idle_seconds: float | None = None) -> dict[str, Any]:
    program = ["-m", "services.forkserver.server", f"{path}.{name}", *modules]
    if idle_seconds is not None:
        program += ["--idle-seconds", str(idle_seconds)]
    return {"command": program, "environment": dict(os.environ), "folder": os.getcwd(), "server": name}


def spawn_forks() -> None:
    """Makes processes that `multiprocessing` spawns in this process forks of a server, from now on."""
    if path := os.environ.get(VARIABLE):
        multiprocessing.set_executable(launcher_of(path))


def preload(job_id: str, modules: Sequence[str], *, wait: bool = False) -> None:
    """Asks the server of a Ray job to import the modules that the job's workers need, when it has no fork to make.

    Does nothing if there is no such server. With `wait`, returns when the modules are imported.
    """
    if path := os.environ.get(VARIABLE):
        with suppress(OSError):
            answers = _send(f"{path}.{job_id}", {"modules": modules})
            if wait:
                answers.readline()


def _wait_for(pid: int, answers: TextIO) -> int:
    """Forwards signals to the fork until it ends, and returns its exit status."""

    def forward(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    status = int(answers.readline() or 1)
    if status < 0:  # a signal killed the fork, so this process ends with the same signal
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def start(path: str, environment: dict[str, str]) -> None:
    """Starts the first server. Returns when it listens at `path`; it does its imports afterwards. Raises OSError."""
    with open(f"{path}.log", "ab") as log:
        command = [sys.executable, "-u", "-m", "services.forkserver.server", path]
        environment = os.environ | environment
        server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    _wait_until_listening(path, lambda: server.poll() is None)


def _wait_until_listening(path: str, living: Callable[[], bool]) -> None:
    """Waits until a server listens at `path`. Raises OSError if it ends, or does not within START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                return connection.connect(path)
        except OSError:
            if not living() or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

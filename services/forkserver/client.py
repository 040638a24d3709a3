"""A Python that asks a fork server: `python -m services.forkserver.client [--wait] <script | -m module> …`.

Ray's workers run on the server of their job, and so do processes that a worker spawns by `multiprocessing`; every other
command is run here. With `--wait` a command runs on a server as well. For what runs with `--wait`, or is spawned, the
client stands: it forwards SIGTERM and SIGINT, ends with the exit status, and takes the fork along when it is killed
itself. A worker needs none of that, since Ray knows its process id from the worker itself.
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

from services.forkserver import JOB_VARIABLE, VARIABLE, launcher_of, lives

# A worker with an environment of its own starts by the second, which goes on to the first.
RAY_WORKERS = ("default_worker.py", "setup_worker.py")
SPAWNED = "--multiprocessing-fork"
RAY = "services.forkserver.loaded_ray"
# Drivers have a server of their own, which imports these before the first is asked for.
DRIVER = "services.training.driver"
DRIVERS_IMPORT = (RAY, DRIVER, "services.training.run.ray_trainer", "services.training.run.worker")
START_SECONDS = 60.0
IDLE_SECONDS = 60.0  # a job's server ends so long after its last fork has


@dataclass
class Ask:
    """Where a command is to run, and whether somebody stands for it."""

    command: list[str]  # a script, -m and a module, or -c and a program; then arguments
    server: str | None = None  # its name; None: the first
    modules: Sequence[str] = ()  # which that server imports before it answers
    idle_seconds: float | None = None  # after which that server ends
    waits: bool = False


def main(arguments: list[str]) -> int:
    """Returns the exit status of what ran on a server, or becomes the command itself."""
    path = os.environ.get(VARIABLE)
    ask = _what_to_ask(arguments)
    if path and ask:
        try:
            pid, answers = _ask(path, ask)
        except OSError as error:
            sys.stderr.write(f"The fork server does not answer ({error}); all is imported anew.\n")
            sys.stderr.flush()
        else:
            return _stand_for(pid, answers) if ask.waits else 0
    command = arguments[1:] if arguments[:1] == ["--wait"] else arguments
    return os.execv(sys.executable, [sys.executable, *command])


def _what_to_ask(arguments: list[str]) -> Ask | None:
    """None: the command is run here."""
    if arguments[:1] == ["--wait"]:
        command = arguments[1:]
        if command[:2] == ["-m", DRIVER]:
            return Ask(command, DRIVER, DRIVERS_IMPORT, waits=True)
        return Ask(command, waits=True)
    job = os.environ.get(JOB_VARIABLE)
    if SPAWNED in arguments:  # behind options of Python, which the server has already
        return Ask(arguments[arguments.index("-c") :], job, (RAY,), IDLE_SECONDS, waits=True)
    if Path(arguments[0]).name in RAY_WORKERS:
        return Ask(arguments, job, (RAY,), IDLE_SECONDS)
    return None


def _ask(path: str, ask: Ask) -> tuple[int, TextIO]:
    """The process id of the fork that runs the command, and where its exit status will stand. Raises OSError."""
    descriptors = _inherited()
    if ask.server is None:
        return _request(path, ask, descriptors)
    own = f"{path}.{ask.server}"
    try:
        return _request(own, ask, descriptors)
    except OSError:  # it has not been started, or ended just now
        _start_server(path, ask.server, ask.modules, ask.idle_seconds)
        return _request(own, ask, descriptors)


def _inherited() -> list[int]:
    """The open files that a program started from here would have."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the list itself
            if os.get_inheritable(number):
                found.append(number)
    return sorted(found)


def _request(path: str, ask: Ask, descriptors: Sequence[int] = ()) -> tuple[int, TextIO]:
    """What the server at `path` answers first, and where the rest will stand. Raises OSError."""
    request = {
        "command": ask.command,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "group": os.getpgrp(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "waits": ask.waits,
        "descriptors": descriptors,
    }
    answers = _send(path, request, descriptors)
    return _pid(answers), answers


def _pid(answers: TextIO) -> int:
    pid = answers.readline()
    if not pid:
        raise ConnectionError("it ended")
    return int(pid)


def _send(path: str, request: dict[str, Any], descriptors: Sequence[int] = ()) -> TextIO:
    """Where the answers will stand."""
    body = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [len(body).to_bytes(4, "big")], descriptors)
        connection.sendall(body)
        return connection.makefile()  # keeps the connection


def prepare_drivers(path: str) -> None:
    """Have drivers find a server that has imported what they import. Returns at once. Raises OSError."""
    _send(path, _server(path, DRIVER, DRIVERS_IMPORT))


def _start_server(path: str, name: str, modules: Sequence[str], idle_seconds: float | None = None) -> None:
    """Have a fork of the first server serve at `<path>.<name>`, unless one does; returns when it listens.

    It answers when it has imported the modules. Raises OSError.
    """
    pid = _pid(_send(path, _server(path, name, modules, idle_seconds)))
    _await(f"{path}.{name}", lambda: lives(pid))


def _server(path: str, name: str, modules: Sequence[str], idle_seconds: float | None = None) -> dict[str, Any]:
    program = ["-m", "services.forkserver.server", f"{path}.{name}", *modules]
    if idle_seconds is not None:
        program += ["--idle-seconds", str(idle_seconds)]
    return {"command": program, "environment": dict(os.environ), "folder": os.getcwd(), "server": name}


def spawn_forks() -> None:
    """From here on, what `multiprocessing` spawns in this process is a fork as well."""
    if path := os.environ.get(VARIABLE):
        multiprocessing.set_executable(launcher_of(path))


def preload(job_id: str, modules: Sequence[str], *, wait: bool = False) -> None:
    """Have the server of one of Ray's jobs import what the workers of that job will, when nobody asks it for a fork.

    Does nothing where there is no such server.
    """
    if path := os.environ.get(VARIABLE):
        with suppress(OSError):
            answers = _send(f"{path}.{job_id}", {"modules": modules})
            if wait:
                answers.readline()


def _stand_for(pid: int, answers: TextIO) -> int:
    def forward(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    status = int(answers.readline() or 1)
    if status < 0:  # it was killed by a signal, and so is this process
        with suppress(OSError):  # SIGKILL is as it is
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def start(path: str, environment: dict[str, str]) -> None:
    """Start the first server, which listens at `path`; returns when it does. It imports afterwards. Raises OSError."""
    with open(f"{path}.log", "ab") as log:
        command = [sys.executable, "-u", "-m", "services.forkserver.server", path]
        environment = os.environ | environment
        server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    _await(path, lambda: server.poll() is None)


def _await(path: str, living: Callable[[], bool]) -> None:
    """Until somebody listens there. Raises OSError."""
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

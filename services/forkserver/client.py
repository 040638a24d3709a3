"""Runs a Python command in a fork of the fork server, a process that has done many imports in advance.

Usage: `python -m services.forkserver.client [--wait] <script | -m module> …`. Three kinds of commands run in a fork:
Ray's workers, processes that a worker spawns with `multiprocessing`, and commands with `--wait`. The first two use the
fork server of their Ray job. The client itself runs every other command.

For spawned processes and commands with `--wait`, the client waits for the end of the fork: it forwards SIGTERM and
SIGINT, and ends with the fork's exit status. If the client is killed, the server kills the fork. For a worker, the
client does not wait, because the worker itself reports its process id to Ray.
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

# A worker with a runtime environment of its own starts with the second script, which then runs the first.
RAY_WORKERS = ("default_worker.py", "setup_worker.py")
SPAWNED = "--multiprocessing-fork"
RAY = "services.forkserver.loaded_ray"
# Drivers have their own server, which imports these modules before the first driver starts.
DRIVER = "services.training.driver"
DRIVERS_IMPORT = (RAY, DRIVER, "services.training.run.ray_trainer", "services.training.run.worker")
START_SECONDS = 60.0
IDLE_SECONDS = 60.0  # between the end of a job's last fork and the end of the job's server


@dataclass
class Launch:
    """Describes a command to run in a fork: its command line, the fork server that makes the fork, and whether the
    client waits for the fork's end.

    If this fork server does not run yet, it is started. It then imports `modules`, and ends `idle_seconds` after its
    last fork has ended (None: never).
    """

    command: list[str]  # a script, -m and a module, or -c and a program, followed by arguments
    server: str | None = None  # name of the server; None: the first server
    modules: Sequence[str] = ()  # imported by the server before it answers requests
    idle_seconds: float | None = None  # time without forks after which the server ends; None: never
    waits: bool = False


def main(arguments: list[str]) -> int:
    """Runs the command in `arguments` in a fork of the fork server, and returns the exit status of the command.

    If the command starts a Ray worker, returns 0 without waiting for it. If the fork server cannot run the command, or
    does not answer, replaces this process with the command.
    """
    path = os.environ.get(VARIABLE)
    launch = _launch_of(arguments)
    if path and launch:
        try:
            pid, answers = _fork(path, launch)
        except OSError as error:
            sys.stderr.write(
                f"The server that forks processes does not answer ({error}), so this process starts without a fork, "
                "which is slower.\n"
            )
            sys.stderr.flush()
        else:
            return _wait_for(pid, answers) if launch.waits else 0
    command = arguments[1:] if arguments[:1] == ["--wait"] else arguments
    return os.execv(sys.executable, [sys.executable, *command])


def _launch_of(arguments: list[str]) -> Launch | None:
    """Returns how to run the command in `arguments` in a fork: which fork server makes the fork, and whether the client
    waits for its end.

    Returns None if the command must run in this process itself.
    """
    if arguments[:1] == ["--wait"]:
        command = arguments[1:]
        if command[:2] == ["-m", DRIVER]:
            return Launch(command, DRIVER, DRIVERS_IMPORT, waits=True)
        return Launch(command, waits=True)
    job = os.environ.get(JOB_VARIABLE)
    if SPAWNED in arguments:  # options of Python come before; the server has them already
        return Launch(arguments[arguments.index("-c") :], job, (RAY,), IDLE_SECONDS, waits=True)
    if Path(arguments[0]).name in RAY_WORKERS:
        return Launch(arguments, job, (RAY,), IDLE_SECONDS)
    return None


def _fork(path: str, launch: Launch) -> tuple[int, TextIO]:
    """Asks a fork server to run the command of `launch` in a fork. Returns the fork's process id, and a file whose next
    line will be the fork's exit status.

    Starts the fork server that `launch` names, if it does not run. Raises OSError if no server answers.
    """
    descriptors = _inherited()
    if launch.server is None:
        return _request_fork(path, launch, descriptors)
    server_path = f"{path}.{launch.server}"
    try:
        return _request_fork(server_path, launch, descriptors)
    except OSError:  # the server is not started yet, or has just ended
        _start_server(path, launch.server, launch.modules, launch.idle_seconds)
        return _request_fork(server_path, launch, descriptors)


def _inherited() -> list[int]:
    """Returns the descriptors of this process's open files that a child program would inherit."""
    inherited = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the descriptor of the listing is closed by now
            if os.get_inheritable(number):
                inherited.append(number)
    return sorted(inherited)


def _request_fork(path: str, launch: Launch, descriptors: Sequence[int]) -> tuple[int, TextIO]:
    """Asks the fork server at the socket `path` for a fork that runs the command of `launch` and gets the open files
    `descriptors`. Returns the fork's process id, and the file from which the server's further answers can be read.

    Raises OSError if the server does not answer.
    """
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
    """Sends a request and the open files `descriptors` to the fork server at the socket `path`. Returns the file from
    which the server's answers can be read."""
    body = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [len(body).to_bytes(4, "big")], descriptors)
        connection.sendall(body)
        return connection.makefile()  # the file keeps the connection open


def prepare_drivers(path: str) -> None:
    """Starts the fork server of the drivers (the main programs of training jobs), which imports the modules that
    drivers need. Returns before the imports are done.

    The node's first fork server, which listens at `path`, starts the new one. Raises OSError if the first server does
    not answer.
    """
    _send(path, _server_request(path, DRIVER, DRIVERS_IMPORT))


def _start_server(path: str, name: str, modules: Sequence[str], idle_seconds: float | None = None) -> None:
    """Starts the fork server `name` at the socket `<path>.<name>`, as a fork of the server that listens at `path`.

    Does not start a second server if a server of this name runs. Returns when the server listens; it answers requests
    after it has imported `modules`. The server ends `idle_seconds` after its last fork has ended, or not at all if
    `idle_seconds` is None. Raises OSError if the server at `path` does not answer or the new one does not listen.
    """
    pid = _read_pid(_send(path, _server_request(path, name, modules, idle_seconds)))
    _wait_until_listening(f"{path}.{name}", lambda: is_alive(pid))


def _server_request(path: str, name: str, modules: Sequence[str], idle_seconds: float | None = None) -> dict[str, Any]:
    program = ["-m", "services.forkserver.server", f"{path}.{name}", *modules]
    if idle_seconds is not None:
        program += ["--idle-seconds", str(idle_seconds)]
    return {"command": program, "environment": dict(os.environ), "folder": os.getcwd(), "server": name}


def spawn_forks() -> None:
    """Makes `multiprocessing` start this process's children as forks of a fork server, which is faster, from now on.

    Does nothing on a node without a fork server.
    """
    if path := os.environ.get(VARIABLE):
        multiprocessing.set_executable(launcher_of(path))


def preload(job_id: str, modules: Sequence[str], *, wait: bool = False) -> None:
    """Asks the fork server of a Ray job to import `modules`, so that later forks need not import them.

    The server imports the modules while it has no fork to make. Does nothing if the job has no server. With `wait`,
    returns when the modules are imported.
    """
    if path := os.environ.get(VARIABLE):
        with suppress(OSError):
            answers = _send(f"{path}.{job_id}", {"modules": modules})
            if wait:
                answers.readline()


def _wait_for(pid: int, answers: TextIO) -> int:
    """Forwards SIGTERM and SIGINT to the fork `pid` until the fork ends, and returns the fork's exit status. The server
    writes this status to `answers`."""

    def forward(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    status = int(answers.readline() or 1)
    if status < 0:  # a signal killed the fork, so this process ends with the same signal
        with suppress(OSError):  # SIGKILL cannot have a handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def start(path: str, environment: dict[str, str]) -> None:
    """Starts the first fork server of a node, with the variables `environment` added to this process's environment.

    Returns when the server listens at the socket `path`, before the server has imported its modules. Raises OSError if
    the server does not listen.
    """
    with open(f"{path}.log", "ab") as log:
        command = [sys.executable, "-u", "-m", "services.forkserver.server", path]
        environment = os.environ | environment
        server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    _wait_until_listening(path, lambda: server.poll() is None)


def _wait_until_listening(path: str, living: Callable[[], bool]) -> None:
    """Waits until a server listens at `path`.

    Raises OSError if the server ends (`living` returns False) or does not listen within START_SECONDS.
    """
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

"""Runs the fork server: `python -m services.forkserver.server <socket> [module …] [--idle-seconds N]`.

The server imports the modules that the processes of jobs need, and then makes a fork for each client that asks. A fork
is safe only while the server has a single thread and no open GPU, so the server checks both before each fork. The
server ends when Ray ends, or N seconds after the end of its last fork.
"""

import argparse
import atexit
import fcntl
import gc
import importlib
import json
import math
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from services.forkserver import RAYLET_VARIABLE, VARIABLE, is_alive, launcher_of

# Imports of the first server. Ray is left out, because Ray reads its settings on import and workers' settings differ.
MODULES = (
    "grpc",
    "jsonschema",
    "requests",
    "rich.console",
    "google.protobuf.json_format",
    "pandas",
    "pyarrow.parquet",
    "services.contract",
    "services.storage",
    "dpo_core.data.feedback",
    "httpx",
    "aiohttp",
    "uvicorn",
    "fsspec",
    "pygments.lexers",
    "rich.syntax",
    "fastapi.applications",
    "torch",
    "dpo_core.policy.scorer",
    "dpo_core.training.trainer",
    "torch.distributed.fsdp",
)
# Libraries read these variables on import, and the server does the imports for all forks.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # otherwise idle OpenMP threads spin: a step takes 25 times longer on a busy machine
    "OPENBLAS_NUM_THREADS": "1",  # otherwise numpy's OpenBLAS starts threads on import
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # torch looks for a GPU without opening it
}
PERIOD_SECONDS = 2.0  # between two checks whether the raylet is alive
MAX_FILES = 64  # most open files that a client may pass
THREADS = ("jemalloc_bg_thd",)  # allowed beside the main thread: jemalloc stops and restarts its thread around a fork


@dataclass
class Request:
    """A client's request to the fork server. The request is either to make a fork that runs `command`, with the
    client's environment, working folder and open files, or to import `modules`."""

    client: socket.socket
    files: Sequence[int] = ()  # descriptors in this process of the client's open files
    descriptors: Sequence[int] = ()  # the files' descriptors in the client and in the fork
    command: Sequence[str] = ()  # a script, -m and a module, or -c and a program, followed by arguments
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = "/"
    group: int = 0  # the client's process group, by which Ray ends a worker and its children; 0: its own group
    niceness: int | None = None  # None: the niceness of the server
    waits: bool = False  # whether the client waits for the exit status
    server: str | None = None  # name; the fork becomes the only server of this name
    modules: Sequence[str] = ()  # modules to import


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--idle-seconds", type=float, default=math.inf)
    options = parser.parse_args(arguments)
    os.environ.update(ENVIRONMENT)
    with ExitStack() as ours:
        server = ForkServer(options.path, ours, idle_seconds=options.idle_seconds)
        request = server.serve(options.modules or MODULES)
    if request is not None:
        become(request)


class ForkServer:
    """Listens on the socket `path`, and makes a fork of this process for each client that asks for one.

    `ours` holds the server's own open files, which every fork closes. The server ends `idle_seconds` after its last
    fork has ended.
    """

    def __init__(self, path: str, ours: ExitStack, *, idle_seconds: float = math.inf) -> None:
        Path(path).unlink(missing_ok=True)
        mask = os.umask(0o177)  # only the server's user may connect
        self._listening = ours.enter_context(socket.socket(socket.AF_UNIX))
        self._listening.bind(path)
        os.umask(mask)
        self._listening.listen(128)
        # The end of a child process wakes the server while it waits for requests.
        self._woken, waking = (ours.enter_context(end) for end in socket.socketpair())
        for end in (self._woken, waking):
            end.setblocking(False)
        signal.set_wakeup_fd(waking.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._children = set[int]()
        self._clients: dict[int, socket.socket] = {}  # clients that wait for the end of a child, by process id
        self._servers: dict[str, int] = {}  # process ids of servers, by name
        self._imports = deque[Request]()
        self._obstacle: str | None = None  # the reason why this server must not fork
        self._raylet = int(os.environ.get(RAYLET_VARIABLE, os.getppid()))
        self._idle_seconds, self._last = idle_seconds, time.monotonic()
        self._path = path

    def serve(self, modules: Sequence[str]) -> Request | None:
        """Imports `modules`, and then answers requests until the server ends.

        Returns in each fork that the server makes, and at the end in the server itself. In a fork, the result is the
        client's request, whose command the fork must run. In the server, the result is None.
        """
        for module in modules:
            importlib.import_module(module)
        self._settle()
        while is_alive(self._raylet) and not self._is_idle():
            request = self._next(0 if self._imports else PERIOD_SECONDS)
            if request is None and self._imports:
                self._import_one()
            elif request and request.modules:
                self._imports.append(request)
            elif request and self._fork(request):
                return request
        Path(self._path).unlink(missing_ok=True)
        return None

    def _settle(self) -> None:
        """Prepares the server's memory for forks, after imports. If an import has used Ray's random generator, also
        stops the making of forks, because all forks would draw the same ids from this generator."""
        gc.collect()
        gc.freeze()  # the collector must not touch imported objects, as this copies memory pages that forks share
        ray = sys.modules.get("services.forkserver.loaded_ray")
        if ray and ray.has_drawn():
            self._obstacle = (
                "An import has drawn one of Ray's random ids. Forks would draw equal ids, so processes start without "
                "forks."
            )

    def _is_idle(self) -> bool:
        if self._children or self._imports:
            self._last = time.monotonic()
        return time.monotonic() - self._last > self._idle_seconds

    def _next(self, seconds: float) -> Request | None:
        """Waits up to `seconds` for a client's request. Returns the request, or None if none came.

        While it waits, the server tells clients about the end of their forks. It kills a fork if the client that waited
        for this fork has ended.
        """
        waiting = [self._listening, self._woken, *self._clients.values()]
        ready, _, _ = select.select(waiting, [], [], seconds)
        if self._woken in ready:
            self._woken.recv(1024)
            self._reap()
        for pid, client in list(self._clients.items()):
            if client in ready:  # a client writes nothing after its request, so it has ended
                os.kill(pid, signal.SIGKILL)
        if self._listening not in ready:
            return None
        client, _ = self._listening.accept()
        try:
            return self._read(client)
        except (OSError, ValueError, TypeError):
            client.close()
            return None

    def _read(self, client: socket.socket) -> Request:
        """Reads one request from a client's connection, and the open files that the client passes with the request.

        Clients are our own programs, which write a whole request at once.
        """
        client.settimeout(5)
        head, files, _, _ = socket.recv_fds(client, 4, MAX_FILES)
        with client.makefile("rb") as body:
            fields: dict[str, Any] = json.loads(body.read(int.from_bytes(head, "big")))
        return Request(**fields, files=files, client=client)

    def _import_one(self) -> None:
        """Imports the next module of the oldest request for imports. If this was the last module of the request,
        answers the request."""
        request = self._imports[0]
        first, *request.modules = request.modules
        try:
            importlib.import_module(first)
        except Exception:
            traceback.print_exc()  # a process that needs the module fails by itself
        if not request.modules:
            self._settle()
            self._imports.popleft()
            _answer(request.client, 0)
            request.client.close()

    def _fork(self, request: Request) -> bool:
        """Makes a fork for the request, and answers the client with the fork's process id. Returns True in the fork,
        and False in the server.

        If the request asks for a fork server that runs already, makes no fork and answers with that server's process
        id. If a fork would be unsafe, makes no fork and closes the connection without an answer.
        """
        client, running = request.client, self._servers.get(request.server or "")
        obstacle = self._obstacle or _obstacle_now()
        pid = os.fork() if not running and not obstacle else None
        if pid == 0:
            for other in (client, *self._clients.values(), *(each.client for each in self._imports)):
                other.close()
            return True
        for file in request.files:
            os.close(file)
        if pid:
            self._children.add(pid)
            _put_in_group(pid, request.group)
            if request.server:
                self._servers[request.server] = pid
        elif not running:
            sys.stderr.write(f"{obstacle}\n")
        if answer := running or pid:
            _answer(client, answer)
        if pid and request.waits:
            self._clients[pid] = client
        else:
            client.close()
        return False

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                self._children.discard(pid)
                self._servers = {name: server for name, server in self._servers.items() if server != pid}
                if client := self._clients.pop(pid, None):
                    with client:
                        _answer(client, os.waitstatus_to_exitcode(status))


def _put_in_group(pid: int, group: int) -> None:
    """Puts the fork `pid` into `group`, the process group of its client. If that fails, puts it into a group of its
    own.

    Ray ends a worker's whole process group with the worker, so the fork must not stay in the server's group. The client
    ends only after the server's answer, so the client's group still exists here.
    """
    try:
        os.setpgid(pid, group)
    except OSError:  # the group belongs to another session, as the group of a job's driver does
        with suppress(OSError):
            os.setpgid(pid, 0)


def _answer(client: socket.socket, number: int) -> None:
    with suppress(OSError):  # the client has ended
        client.sendall(b"%d\n" % number)


def become(request: Request) -> NoReturn:
    """Runs the request's command in this fork, as if Python had been started with the command, and ends the process.

    The exit status is the command's.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _take_files(request.files, request.descriptors)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    if request.niceness is not None:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, request.niceness)
    try:
        run(request.command)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
        status = 1
    # This ends the process as Python does, but does not clear all modules, which takes half a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _take_files(files: Sequence[int], numbers: Sequence[int]) -> None:
    """Renumbers the open files that a client passed to this fork: each file gets the descriptor number that it has in
    the client. `files` holds the present numbers, `numbers` those of the client.

    Both sequences are empty for a fork that becomes a server.
    """
    beyond = max((*files, *numbers), default=0) + 1  # files move first above all numbers, so that none replaces another
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, beyond) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)


def run(command: Sequence[str]) -> None:
    """Runs a Python command in this process.

    The command is a script's path, `-m` and a module, or `-c` and a program, followed by arguments.
    """
    first, *rest = command
    if first == "-m":
        sys.modules.pop(rest[0], None)
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], sys.argv = os.getcwd(), ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        # If a worker has a runtime environment, the script starts the worker with the `py_executable` that is set here.
        launcher = json.dumps(launcher_of(os.environ[VARIABLE]))
        sys.argv = [
            word.replace(f'"py_executable": {json.dumps(sys.executable)}', f'"py_executable": {launcher}')
            for word in command
        ]
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def _obstacle_now() -> str | None:
    """Returns the reason why a fork of this process would be unsafe now, or None if a fork is safe."""
    names = [Path("/proc/self/task", task, "comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    names.remove(Path("/proc/self/comm").read_text().strip())
    if threads := [name for name in names if name not in THREADS]:
        named = ", ".join(threads)
        return f"The server that forks processes has threads ({named}), which forks lack, so it does not fork."
    files = [_target(name) for name in os.listdir("/proc/self/fd")]
    if devices := [file for file in files if file.startswith("/dev/nvidia")]:
        return (
            f"The server that forks processes has opened {', '.join(devices)}, which forks cannot use, "
            "so it does not fork."
        )
    return None


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # the descriptor of the listing is closed by now
        return ""


if __name__ == "__main__":
    main(sys.argv[1:])

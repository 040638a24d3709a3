"""The fork server: `python -m services.forkserver.server <socket> [module …] [--idle-seconds N]`.

It imports what the processes of jobs import, and then forks for whoever asks. A fork is safe while the server has one
thread and has opened no device, so it looks before each. It ends with Ray, or N seconds after its last fork has.
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

from services.forkserver import RAYLET_VARIABLE, VARIABLE, launcher_of, lives

# Nothing of Ray: its library reads its settings when it is loaded, and each worker has its own.
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
# Read when libraries are loaded, here and for all forks.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # otherwise OpenMP's threads spin: a step takes 25 times longer on a busy machine
    "OPENBLAS_NUM_THREADS": "1",  # numpy's would start threads at once
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whether there is a GPU is asked without opening it
}
PERIOD_SECONDS = 2.0  # between two looks at the raylet
MAX_FILES = 64  # of a client
THREADS = ("jemalloc_bg_thd",)  # beside the main one: jemalloc stops and starts its own around a fork


@dataclass
class Request:
    """What a client asks for: a fork, or imports."""

    client: socket.socket
    files: Sequence[int] = ()  # the client's open files
    descriptors: Sequence[int] = ()  # their numbers there, and in the fork
    command: Sequence[str] = ()  # a script, -m and a module, or -c and a program; then arguments
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = "/"
    group: int = 0  # the client's process group, by which Ray ends a worker and its children; 0: one of its own
    niceness: int | None = None  # None: the server's
    waits: bool = False  # for the exit status
    server: str | None = None  # the fork is a server of that name, of which there is one
    modules: Sequence[str] = ()  # to import


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
    """Listens at `path`; `ours` are the files that forks close."""

    def __init__(self, path: str, ours: ExitStack, *, idle_seconds: float = math.inf) -> None:
        Path(path).unlink(missing_ok=True)
        mask = os.umask(0o177)  # only its user may ask
        self._listening = ours.enter_context(socket.socket(socket.AF_UNIX))
        self._listening.bind(path)
        os.umask(mask)
        self._listening.listen(128)
        # A child's end wakes the wait for requests.
        self._woken, waking = (ours.enter_context(end) for end in socket.socketpair())
        for end in (self._woken, waking):
            end.setblocking(False)
        signal.set_wakeup_fd(waking.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._children = set[int]()
        self._clients: dict[int, socket.socket] = {}  # of the children that somebody stands for
        self._servers: dict[str, int] = {}
        self._imports = deque[Request]()
        self._trouble: str | None = None
        self._raylet = int(os.environ.get(RAYLET_VARIABLE, os.getppid()))
        self._idle_seconds, self._last = idle_seconds, time.monotonic()
        self._path = path

    def serve(self, modules: Sequence[str]) -> Request | None:
        """Returns the request in each fork, and None in the server when it is not needed any more."""
        for module in modules:
            importlib.import_module(module)
        self._settle()
        while lives(self._raylet) and not self._is_idle():
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
        """After imports."""
        gc.collect()
        gc.freeze()  # to walk what is imported would copy the pages that forks share
        ray = sys.modules.get("services.forkserver.loaded_ray")
        if ray and ray.has_drawn():
            self._trouble = "An import has drawn one of Ray's random ids: the fork server does not fork."

    def _is_idle(self) -> bool:
        if self._children or self._imports:
            self._last = time.monotonic()
        return time.monotonic() - self._last > self._idle_seconds

    def _next(self, seconds: float) -> Request | None:
        """Waits for a request; meanwhile tells of children that end, and ends those that nobody stands for any more."""
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
        """A client is one of our own programs, which writes all of its request at once."""
        client.settimeout(5)
        head, files, _, _ = socket.recv_fds(client, 4, MAX_FILES)
        with client.makefile("rb") as body:
            fields: dict[str, Any] = json.loads(body.read(int.from_bytes(head, "big")))
        return Request(**fields, files=files, client=client)

    def _import_one(self) -> None:
        """The next module of the oldest request for imports, which is answered after its last."""
        request = self._imports[0]
        first, *request.modules = request.modules
        try:
            importlib.import_module(first)
        except Exception:
            traceback.print_exc()  # who needs it will say so
        if not request.modules:
            self._settle()
            self._imports.popleft()
            _answer(request.client, 0)
            request.client.close()

    def _fork(self, request: Request) -> bool:
        """Whether this is the fork."""
        client, running = request.client, self._servers.get(request.server or "")
        trouble = self._trouble or _what_keeps_from_forking()
        pid = os.fork() if not running and not trouble else None
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
            sys.stderr.write(f"{trouble}\n")
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
    """Put a fork into its client's process group, or into one of its own.

    It must not stay in the server's: Ray would end that with a worker. The client is told later, so its group exists.
    """
    try:
        os.setpgid(pid, group)
    except OSError:  # it is another session's, as a job's driver's is
        with suppress(OSError):
            os.setpgid(pid, 0)


def _answer(client: socket.socket, number: int) -> None:
    with suppress(OSError):  # it has ended
        client.sendall(b"%d\n" % number)


def become(request: Request) -> NoReturn:
    """Run the request's program, as if Python had started with it, and end with it."""
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
    # As Python ends, but for taking all modules apart, which takes half a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _take_files(files: Sequence[int], numbers: Sequence[int]) -> None:
    """Have each file under the number that its client had it under. A server has no client's files."""
    beyond = max((*files, *numbers), default=0) + 1  # none of those that are yet to be moved
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, beyond) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)


def run(command: Sequence[str]) -> None:
    """A script by its path, -m and a module, or -c and a program; with its arguments."""
    first, *rest = command
    if first == "-m":
        sys.modules.pop(rest[0], None)
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], sys.argv = os.getcwd(), ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        # A worker with an environment of its own is set up first, and then started by the Python that is named here.
        launcher = json.dumps(launcher_of(os.environ[VARIABLE]))
        sys.argv = [
            word.replace(f'"py_executable": {json.dumps(sys.executable)}', f'"py_executable": {launcher}')
            for word in command
        ]
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def _what_keeps_from_forking() -> str | None:
    names = [Path("/proc/self/task", task, "comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    names.remove(Path("/proc/self/comm").read_text().strip())
    if threads := [name for name in names if name not in THREADS]:
        return f"The fork server has threads, {threads}, and does not fork."
    files = [_target(name) for name in os.listdir("/proc/self/fd")]
    if devices := [file for file in files if file.startswith("/dev/nvidia")]:
        return f"The fork server has opened {devices}, and does not fork."
    return None


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # the list itself
        return ""


if __name__ == "__main__":
    main(sys.argv[1:])

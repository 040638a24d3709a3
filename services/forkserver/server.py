"""The fork server: `python -m services.forkserver.server <socket>`.

It imports what the processes of jobs import, and then forks for whoever asks. A fork is safe while the server has one
thread and has opened no device, so it looks before each. It ends with the process that started Ray.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from services.forkserver import RAYLET_VARIABLE, VARIABLE

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
    "dpo_core.feedback",
    "httpx",
    "aiohttp",
    "uvicorn",
    "fsspec",
    "pygments.lexers",
    "rich.syntax",
    "fastapi.applications",
    "torch",
    "dpo_core.scorer",
    "dpo_core.trainer",
    "torch.distributed.fsdp",
)
# Read when libraries are loaded, here and for all forks.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # otherwise OpenMP's threads spin: a step takes 25 times longer on a busy machine
    "OPENBLAS_NUM_THREADS": "1",  # numpy's would start threads at once
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whether there is a GPU is asked without opening it
}
PERIOD_SECONDS = 2.0  # between two looks at the raylet
THREADS = ("jemalloc_bg_thd",)  # beside the main one: jemalloc stops and starts its own around a fork


@dataclass
class Request:
    """What a client asks for."""

    command: list[str]  # a script, or -m and a module, then arguments
    environment: dict[str, str]
    folder: str
    group: int  # the client's process group: Ray ends a worker's children by it
    niceness: int
    waits: bool  # for the exit status
    streams: Sequence[int]  # standard input, output, error
    client: socket.socket


def main(path: str) -> None:
    os.environ.update(ENVIRONMENT)
    with ExitStack() as ours:
        request = ForkServer(path, ours).serve(MODULES)
    if request is not None:
        become(request)


class ForkServer:
    """Listens at `path`; `ours` are the files that forks close."""

    def __init__(self, path: str, ours: ExitStack) -> None:
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
        self._children: dict[int, socket.socket] = {}  # those that somebody stands for
        self._raylet = int(os.environ.get(RAYLET_VARIABLE, os.getppid()))
        self._path = path

    def serve(self, modules: Sequence[str]) -> Request | None:
        """Returns the request in each fork, and None in the server when its raylet is gone."""
        for module in modules:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # to walk them would copy the pages that forks share
        while _lives(self._raylet):
            request = self._next(PERIOD_SECONDS)
            if request and self._fork(request):
                return request
        Path(self._path).unlink(missing_ok=True)
        return None

    def _next(self, seconds: float) -> Request | None:
        """Waits for a request; meanwhile tells of children that end, and ends those that nobody stands for any more."""
        waiting = [self._listening, self._woken, *self._children.values()]
        ready, _, _ = select.select(waiting, [], [], seconds)
        if self._woken in ready:
            self._woken.recv(1024)
            self._reap()
        for pid, client in list(self._children.items()):
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
        head, streams, _, _ = socket.recv_fds(client, 4, 3)
        with client.makefile("rb") as body:
            fields: dict[str, Any] = json.loads(body.read(int.from_bytes(head, "big")))
        return Request(**fields, streams=streams, client=client)

    def _fork(self, request: Request) -> bool:
        """Whether this is the fork."""
        client = request.client
        trouble = _what_keeps_from_forking()
        pid = None if trouble else os.fork()
        if pid == 0:
            for other in self._children.values():
                other.close()
            client.close()
            return True
        for stream in request.streams:
            os.close(stream)
        if pid is None:
            sys.stderr.write(f"{trouble}\n")
            client.close()
            return False
        with suppress(OSError):
            client.sendall(b"%d\n" % pid)
        if request.waits:
            self._children[pid] = client
        else:
            client.close()
        return False

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                if client := self._children.pop(pid, None):
                    with client, suppress(OSError):
                        client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def become(request: Request) -> NoReturn:
    """Run the request's program, as if Python had started with it, and end with it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(request.streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    with suppress(OSError):  # it is another session's, as a job's driver's is
        os.setpgid(0, request.group)
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


def run(command: Sequence[str]) -> None:
    """A script by its path, or -m and a module; with its arguments."""
    first, *rest = command
    if first == "-m":
        sys.modules.pop(rest[0], None)
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        # A worker with an environment of its own is set up first, and then started by the Python that is named here.
        launcher = json.dumps(f"{os.environ[VARIABLE]}.python")
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


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1])

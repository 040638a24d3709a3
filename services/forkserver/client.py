"""A Python that asks the fork server: `python -m services.forkserver.client [--wait] <script | -m module> …`.

Ray's workers run on the server; every other command is run here. With `--wait` a command runs on the server as well,
and the client stands for it: it forwards SIGTERM and SIGINT, ends with its exit status, and takes it along when it is
killed itself. A worker needs none of that, since Ray knows its process id from the worker itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from services.forkserver import VARIABLE

# A worker with an environment of its own starts by the second, which goes on to the first.
RAY_WORKERS = ("default_worker.py", "setup_worker.py")
START_SECONDS = 60.0


def main(arguments: list[str]) -> int:
    """Returns the exit status of what ran on the server, or becomes the command itself."""
    waits = arguments[:1] == ["--wait"]
    command = arguments[waits:]
    path = os.environ.get(VARIABLE)
    if path and (waits or Path(command[0]).name in RAY_WORKERS):
        try:
            return _run_on_server(path, command, waits=waits)
        except OSError as error:
            sys.stderr.write(f"The fork server does not answer ({error}); all is imported anew.\n")
            sys.stderr.flush()
    return os.execv(sys.executable, [sys.executable, *command])


def _run_on_server(path: str, command: list[str], *, waits: bool) -> int:
    """Raises OSError if there is no server, and none can be started."""
    request = {
        "command": command,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "group": os.getpgrp(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "waits": waits,
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        body = json.dumps(request).encode()
        socket.send_fds(connection, [len(body).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(body)
        answers = connection.makefile()
        pid = answers.readline()
        if not pid:
            raise ConnectionError("it ended")
        if not waits:
            return 0
        return _stand_for(int(pid), answers.readline)


def _stand_for(pid: int, exit_status: Callable[[], str]) -> int:
    def forward(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    status = int(exit_status() or 1)
    if status < 0:  # it was killed by a signal, and so is this process
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def start(path: str, environment: dict[str, str]) -> None:
    """Start a server that listens at `path`; returns when it does. It imports afterwards."""
    with open(f"{path}.log", "ab") as log:
        command = [sys.executable, "-u", "-m", "services.forkserver.server", path]
        subprocess.Popen(command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + START_SECONDS
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(f"The fork server does not listen after {START_SECONDS:.0f} s; see {path}.log.")
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

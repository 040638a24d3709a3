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
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

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
            pid, answers = _ask(path, command, waits=waits)
        except OSError as error:
            sys.stderr.write(f"The fork server does not answer ({error}); all is imported anew.\n")
            sys.stderr.flush()
        else:
            return _stand_for(pid, answers) if waits else 0
    return os.execv(sys.executable, [sys.executable, *command])


def _ask(path: str, command: list[str], *, waits: bool) -> tuple[int, TextIO]:
    """The process id of the fork that runs the command, and where its exit status will stand. Raises OSError."""
    request = {
        "command": command,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "group": os.getpgrp(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "waits": waits,
    }
    body = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [len(body).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(body)
        answers = connection.makefile()  # keeps the connection
    pid = answers.readline()
    if not pid:
        raise ConnectionError("it ended")
    return int(pid), answers


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

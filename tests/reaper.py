"""Ends the processes that a run of the tests has left: `python tests/reaper.py <pid of the run> <mark>`.

It waits for the end of the run, however the run ends. Every process that a test starts inherits the mark in its
environment. Ctrl-C in a terminal interrupts fixtures before they have stopped what they started, and kill -9 gives them
no time at all.
"""

import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "RAYDPO_TEST_RUN"


def start(pid: int, mark: str) -> None:
    """Starts this program in its own session, so that no signal to the run reaches it."""
    command = [sys.executable, __file__, str(pid), mark]
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    reaper = subprocess.Popen(command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)
    reaper.returncode = 0  # it outlives the run on purpose; Popen would warn


def main(pid: int, mark: str) -> None:
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    for _ in range(5):  # a process may start another while we look
        left = [process for process in psutil.process_iter() if _carries(process, mark)]
        if not left:
            return
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

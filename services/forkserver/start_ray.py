"""Runs the `ray` command so that Ray's workers start as forks of a fork server.

Usage: `python -m services.forkserver.start_ray start --head …`.
"""

import os
import shlex
import sys
from pathlib import Path

from services.forkserver import RAYLET_VARIABLE, VARIABLE, launcher_of
from services.forkserver.client import prepare_drivers, start

LAUNCHER = """#!/bin/sh
exec {python} -m services.forkserver.client "$@"
"""


def start_workers_as_forks(path: str) -> None:
    """Starts a fork server and makes Ray, which this process starts next, run its workers as forks of this server.

    The server ends with this process.
    """
    launcher = write_launcher(path)
    try:
        start(path, {RAYLET_VARIABLE: str(os.getpid())})
        prepare_drivers(path)
    except OSError as error:
        sys.stderr.write(
            f"The server that forks processes did not start ({error}), so Ray's workers start slower, without forks.\n"
        )
        return
    sys.executable = launcher  # Ray starts its processes with this program


def write_launcher(path: str) -> str:
    """Writes the program that Ray starts in place of Python and that asks the fork server at the socket `path` for a
    fork.

    Returns the program's path.
    """
    launcher = Path(launcher_of(path))
    launcher.write_text(LAUNCHER.format(python=shlex.quote(sys.executable)))
    launcher.chmod(0o700)
    return str(launcher)


if __name__ == "__main__":
    if VARIABLE in os.environ and sys.argv[1:2] == ["start"]:
        start_workers_as_forks(os.environ[VARIABLE])
    from ray.scripts.scripts import main

    main()

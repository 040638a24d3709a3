"""Runs the `ray` command with workers that start as forks: `python -m services.forkserver.start_ray start --head …`."""

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
    """Starts a fork server, from which Ray, started by this process, forks its workers. It ends with this process."""
    launcher = write_launcher(path)
    try:
        start(path, {RAYLET_VARIABLE: str(os.getpid())})
        prepare_drivers(path)
    except OSError as error:
        sys.stderr.write(f"The fork server did not start ({error}); workers do all imports themselves.\n")
        return
    sys.executable = launcher  # with which Ray starts its processes


def write_launcher(path: str) -> str:
    """Writes a program that acts as Python and asks the server at `path`. Returns its path."""
    launcher = Path(launcher_of(path))
    launcher.write_text(LAUNCHER.format(python=shlex.quote(sys.executable)))
    launcher.chmod(0o700)
    return str(launcher)


if __name__ == "__main__":
    if VARIABLE in os.environ and sys.argv[1:2] == ["start"]:
        start_workers_as_forks(os.environ[VARIABLE])
    from ray.scripts.scripts import main

    main()

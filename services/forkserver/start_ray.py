"""The `ray` command, whose workers start as forks: `python -m services.forkserver.start_ray start --head …`."""

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
    """From here on, the Ray that this process starts has forks for workers. The server ends with this process."""
    launcher = write_launcher(path)
    try:
        start(path, {RAYLET_VARIABLE: str(os.getpid())})
        prepare_drivers(path)
    except OSError as error:
        sys.stderr.write(f"{error} Workers import everything themselves.\n")
        return
    sys.executable = launcher  # Ray starts its own processes by it


def write_launcher(path: str) -> str:
    """The program that is Python to whoever starts it, and asks the server at `path`."""
    launcher = Path(launcher_of(path))
    launcher.write_text(LAUNCHER.format(python=shlex.quote(sys.executable)))
    launcher.chmod(0o700)
    return str(launcher)


if __name__ == "__main__":
    if VARIABLE in os.environ and sys.argv[1:2] == ["start"]:
        start_workers_as_forks(os.environ[VARIABLE])
    from ray.scripts.scripts import main

    main()

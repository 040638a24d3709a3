"""Tests the program that Ray starts in place of Python."""

import os
import subprocess
import sys
from pathlib import Path

from services import forkserver
from services.forkserver import start_ray
from tests.services.forkserver import test_client as client_tests
from tests.services.forkserver.test_client import SECONDS, script

folder, server, environment = client_tests.folder, client_tests.server, client_tests.environment  # fixtures

SPAWN = """
import multiprocessing, os, sys
from services.forkserver.client import spawn_forks

def answer(queue):
    queue.put((os.getpid(), os.getppid(), "tabnanny" in sys.modules, multiprocessing.current_process().name))
    sys.exit(7)

if __name__ == "__main__":
    spawn_forks()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer, args=(queue,), name="named")
    process.start()
    pid, parent, imported, name = queue.get(timeout=60)
    process.join()
    print([imported, name, process.exitcode, pid != process.pid, parent != os.getpid()])
"""


def test_what_a_worker_spawns_is_a_fork(folder: Path, environment: dict[str, str]) -> None:
    """The child of `multiprocessing` gets its arguments, and its parent gets its exit status."""
    start_ray.write_launcher(environment[forkserver.VARIABLE])
    command = [sys.executable, script(folder, SPAWN)]
    environment |= {forkserver.JOB_VARIABLE: "01"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=SECONDS)
    assert done.stdout.decode().strip() == "[True, 'named', 7, True, True]"


def test_the_launcher_is_its_users_alone_and_without_a_server_runs_python_with_its_arguments(folder: Path) -> None:
    launcher = start_ray.write_launcher(str(folder / "fork.sock"))
    assert launcher == forkserver.launcher_of(str(folder / "fork.sock"))
    assert Path(launcher).stat().st_mode & 0o777 == 0o700
    own = {name: value for name, value in os.environ.items() if name != forkserver.VARIABLE}
    command = [launcher, "-c", "import sys; print(sys.argv[1:])", "a b", "$c"]
    done = subprocess.run(command, env=own, stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode().strip() == "['a b', '$c']"

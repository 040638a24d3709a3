"""Tests the fork server itself: when it ends, who may ask it, and when it does not fork."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services import forkserver
from services.forkserver import client
from services.forkserver.server import MODULES
from tests.services.forkserver import test_client as client_tests
from tests.services.forkserver.test_client import CLIENT, SECONDS, SHOW, WAIT, script, start_server

folder, server, environment = client_tests.folder, client_tests.server, client_tests.environment  # fixtures


def test_a_fork_is_never_in_the_servers_group(
    server: subprocess.Popen[bytes], folder: Path, environment: dict[str, str]
) -> None:
    """Ray ends a worker's whole process group. Here the client is in another session, whose group the fork cannot
    join."""
    command = [*CLIENT, script(folder, WAIT, "default_worker.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as other:
        assert other.stdout
        pid = int(other.stdout.readline())
        assert os.getpgid(pid) == pid != os.getpgid(server.pid)
        os.kill(pid, signal.SIGKILL)


def test_a_jobs_server_ends_after_its_last_fork(folder: Path, environment: dict[str, str]) -> None:
    path = environment[forkserver.VARIABLE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(forkserver.RAYLET_VARIABLE, str(os.getpid()))
        client._start_server(path, "job", ["tabnanny"], idle_seconds=0.1)
        assert Path(f"{path}.job").exists()
    deadline = time.monotonic() + SECONDS
    while Path(f"{path}.job").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_with_threads_does_not_fork(folder: Path) -> None:
    (folder / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
    )
    environment = {"PYTHONPATH": f"{folder}:{Path(__file__).parents[3]}", forkserver.RAYLET_VARIABLE: str(os.getpid())}
    server = start_server(folder, ("threads",), environment)
    try:
        own = os.environ | {forkserver.VARIABLE: str(folder / "fork.sock")}
        with subprocess.Popen(
            [*CLIENT, "--wait", script(folder, SHOW)], env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as client:
            out, said = client.communicate(timeout=SECONDS)
        assert json.loads(out)["pid"] == client.pid
        assert b"does not answer" in said
        assert "has threads" in (folder / "log").read_text()
    finally:
        server.kill()
        server.wait()


def test_a_server_ends_with_the_process_that_started_ray(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE) as raylet:
        server = start_server(folder, ("tabnanny",), {forkserver.RAYLET_VARIABLE: str(raylet.pid)})
        raylet.kill()
    assert server.wait(SECONDS) == 0
    assert not (folder / "fork.sock").exists()


def test_only_its_user_may_ask_a_server(server: subprocess.Popen[bytes], folder: Path) -> None:
    assert (folder / "fork.sock").stat().st_mode & 0o077 == 0


def test_what_is_imported_holds_nothing_of_ray() -> None:
    """Ray's library reads a worker's settings from the environment when it is loaded, and only then."""
    program = f"import importlib, sys; [importlib.import_module(m) for m in {MODULES}]; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, check=True)
    assert done.stdout.split()[-1] == b"False"

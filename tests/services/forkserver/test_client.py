"""Tests commands on a fork server that has few imports, started by its client as a job or Ray starts them."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from services import forkserver
from services.forkserver import client

CLIENT = [sys.executable, "-m", "services.forkserver.client"]
SHOW = """
import json, os, sys
shown = {"pid": os.getpid(), "parent": os.getppid(), "arguments": sys.argv[1:], "folder": os.getcwd(),
         "variable": os.environ.get("SHOWN"),
         "imported": "tabnanny" in sys.modules, "path": sys.path[0], "group": os.getpgrp(), "ray": "ray" in sys.modules,
         "later": "this" in sys.modules, "nice": os.getpriority(os.PRIO_PROCESS, 0)}
print(json.dumps(shown))
"""
WAIT = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
SECONDS = 120.0


def start_server(folder: Path, modules: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    path = str(folder / "fork.sock")
    command = [sys.executable, "-m", "services.forkserver.server", path, *modules]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=os.environ | environment, stderr=log)
    deadline = time.monotonic() + SECONDS
    while not Path(path).exists():
        assert server.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return server


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fork", dir="/tmp") as name:  # short, for the socket
        yield Path(name)


@pytest.fixture
def server(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    server = start_server(folder, ("tabnanny",), {forkserver.RAYLET_VARIABLE: str(os.getpid())})
    yield server
    server.kill()
    server.wait()


@pytest.fixture
def environment(server: subprocess.Popen[bytes], folder: Path) -> dict[str, str]:
    return os.environ | {forkserver.VARIABLE: str(folder / "fork.sock"), "SHOWN": "to the fork"}


def script(folder: Path, program: str, name: str = "program.py") -> str:
    (folder / name).write_text(program)
    return str(folder / name)


def gone(pid: int) -> bool:
    deadline = time.monotonic() + SECONDS
    while psutil.pid_exists(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_command_runs_as_if_python_had_started_with_it_but_for_its_imports(
    server: subprocess.Popen[bytes], folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [*CLIENT, "--wait", script(folder, SHOW), "first", "--second"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, check=True)
    shown = json.loads(done.stdout)
    assert shown.pop("pid") != os.getpid()
    assert shown.pop("parent") == server.pid
    assert shown == {
        "arguments": ["first", "--second"],
        "folder": str(tmp_path),
        "variable": "to the fork",
        "imported": True,
        "path": str(folder),
        "group": os.getpgrp(),
        "ray": False,
        "later": False,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
    }


def test_a_module_runs_in_the_folder_of_its_client(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "own_module.py").write_text(SHOW)
    command = [*CLIENT, "--wait", "-m", "own_module", "x"]
    environment |= {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, check=True)
    assert json.loads(done.stdout)["arguments"] == ["x"]


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('why')", 1, "why"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'last')", 0, "last"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_a_client_that_waits_ends_as_its_command_did(
    folder: Path, environment: dict[str, str], program: str, status: int, said: str
) -> None:
    once = f"open({str(folder / 'runs')!r}, 'a').write('x')\n"
    command = [*CLIENT, "--wait", script(folder, once + program)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == status
    assert said in done.stderr
    assert (folder / "runs").read_text() == "x"


def test_a_client_forwards_sigterm_and_takes_its_command_along_when_it_is_killed(
    folder: Path, environment: dict[str, str]
) -> None:
    command = [*CLIENT, "--wait", script(folder, WAIT)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as client:
            assert client.stdout
            pid = int(client.stdout.readline())
            client.send_signal(number)
            assert client.wait(SECONDS) == -number
        assert gone(pid)


def test_a_ray_worker_outlives_its_client_and_stays_in_its_group(folder: Path, environment: dict[str, str]) -> None:
    command = [*CLIENT, script(folder, WAIT, "default_worker.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, process_group=0) as client:
        assert client.stdout
        pid = int(client.stdout.readline())
        assert client.wait(SECONDS) == 0
        assert os.getpgid(pid) == client.pid
        os.killpg(client.pid, signal.SIGKILL)  # as a raylet does
    assert gone(pid)


def worker(folder: Path, environment: dict[str, str], job: str) -> dict[str, Any]:
    """Starts a worker of a Ray job through the client, and returns what it prints about itself."""
    out = folder / f"{secrets.token_hex(4)}.out"
    with out.open("wb") as file:
        command = [*CLIENT, script(folder, SHOW, "default_worker.py")]
        subprocess.run(command, env=environment | {forkserver.JOB_VARIABLE: job}, stdout=file, check=True)
    deadline = time.monotonic() + SECONDS
    while not out.read_text().endswith("}\n"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    shown: dict[str, Any] = json.loads(out.read_text())
    return shown


def test_each_of_rays_jobs_has_a_server_that_has_imported_ray_and_then_what_its_driver_says(
    server: subprocess.Popen[bytes], folder: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = worker(folder, environment, "01"), worker(folder, environment, "01")
    assert (first["imported"], first["ray"], first["later"]) == (True, True, False)
    monkeypatch.setenv(forkserver.VARIABLE, environment[forkserver.VARIABLE])
    client.preload("01", ["this"], wait=True)
    client.preload("02", ["this"], wait=True)  # nobody is there: nothing happens
    third, other = worker(folder, environment, "01"), worker(folder, environment, "02")
    assert (third["later"], other["later"]) == (True, False)
    assert first["parent"] == second["parent"] == third["parent"] not in (server.pid, other["parent"])


@pytest.mark.parametrize("variable", ["{folder}/nobody.sock", None])
def test_without_a_server_the_client_becomes_the_command(folder: Path, variable: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != forkserver.VARIABLE}
    if variable:
        environment[forkserver.VARIABLE] = variable.format(folder=folder)
    with subprocess.Popen(
        [*CLIENT, "--wait", script(folder, SHOW)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as client:
        out, said = client.communicate(timeout=SECONDS)
    shown = json.loads(out)
    assert (shown["pid"], shown["imported"]) == (client.pid, False)
    assert (b"The server that forks processes does not answer" in said) == bool(variable)

"""Runs a Ray head node on this machine. The node outlives the process that started it, until `stop_ray` ends it.

Every process of the head inherits a random identifier in its environment. A process with this identifier belongs to the
head, even if the process has detached itself. Processes without the identifier are never stopped.
"""

import getpass
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
import psutil

from services import forkserver
from services.control_plane.settings import Settings
from services.local.errors import StackError

MARK = "RAYDPO_STACK"
START_SECONDS = 300.0  # enough for a busy machine
STOP_SECONDS = 15.0

# With these, Ray gives up a call to a node that was cut off after about a minute; with its defaults, after seven.
# The chart and the Ray image set them as well.
NOTICE_CUTS = {
    "RAY_grpc_client_keepalive_time_ms": "20000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(frozen=True, kw_only=True)
class RayHead:
    """Describes a Ray head node: its random identifier (`mark`), its folder and ports, and the versions with which it
    was started. The file `stack.json` holds these fields.

    The file is written before the head's first process starts, so that every process can be found and stopped.
    """

    mark: str
    folder: str  # of sockets, logs and spilled objects; short, because a socket's path holds at most 107 bytes
    dashboard_port: int
    agent_port: int
    serve_port: int
    ray_version: str
    python: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"


def start_ray(home: Path, token_file: Path, *, say: Callable[[str], None]) -> RayHead:
    """Starts a Ray head node and records it in the folder `home`. Returns the head when jobs can be submitted to it.

    If a head that was recorded earlier still answers, that head is returned, and none is started. `token_file` has the
    token that Ray's clients need, and `say` prints what happens. Raises StackError if Ray does not start.
    """
    recorded = _read(home)
    if recorded and _adoptable(recorded, token_file):
        say(f"Ray is running already at {recorded.url}")
        return recorded
    if recorded:
        stop_ray(home)
    say("starting Ray, which takes 10 to 20 seconds")
    ports = _free_ports(11)
    head = RayHead(
        mark=secrets.token_hex(16),
        folder=tempfile.mkdtemp(prefix="raydpo-", dir="/tmp"),
        dashboard_port=ports[0],
        agent_port=ports[1],
        serve_port=ports[2],
        ray_version=version("ray"),
        python=sys.executable,
    )
    _write(home, head)
    log = home / "ray.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            _command(head, ports[3:]),
            env=_environment(head, token_file, ports[3:]),
            cwd=head.folder,  # not the caller's folder, from which `python -m` in a job would import
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while not _answers(head, token_file):
        if child.poll() is not None or time.monotonic() > deadline:
            raise StackError(f"Ray did not start; the last lines of its log {log} are:\n{_tail(log)}")
        time.sleep(0.2)
    child.returncode = 0  # Ray outlives this object on purpose; otherwise Popen would warn
    return head


def stop_ray(home: Path) -> None:
    """Stops the Ray head node that is recorded in `home`, and every process that belongs to it.

    The head's last logs stay in `home`. Raises StackError if processes do not end.
    """
    head = _read(home)
    if head is None:
        return
    _terminate([process for process in processes_with(head.mark) if "--head" in process.cmdline()], STOP_SECONDS)
    for _ in range(5):  # a process may start another one during the search
        remaining = processes_with(head.mark)
        if not remaining:
            break
        _terminate(remaining, 3)
    else:
        raise StackError(
            f"Ray's processes {[process.pid for process in remaining]} do not end; kill these processes by hand."
        )
    _keep_logs(Path(head.folder), home / "ray-logs")
    shutil.rmtree(head.folder, ignore_errors=True)
    (home / "stack.json").unlink()


def _command(head: RayHead, ports: list[int]) -> list[str]:
    gcs, agent_grpc, runtime_env, metrics, client, node_manager, object_manager, _ = ports
    memory = psutil.virtual_memory().total
    options = {
        "node-ip-address": "127.0.0.1",
        "port": gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": head.dashboard_port,
        "dashboard-agent-listen-port": head.agent_port,
        "dashboard-agent-grpc-port": agent_grpc,
        "runtime-env-agent-port": runtime_env,
        "metrics-export-port": metrics,
        "ray-client-server-port": client,
        "node-manager-port": node_manager,
        "object-manager-port": object_manager,
        "min-worker-port": 0,  # 0: any free port
        "max-worker-port": 0,
        "temp-dir": f"{head.folder}/ray",  # Ray opens this folder to all users; only its owner may enter the parent
        # Logical CPUs: drivers, trainers and replicas are scheduled together and share the real cores.
        "num-cpus": max(8, 4 * (os.cpu_count() or 1)),
        "object-store-memory": min(max(memory // 16, 2**29), 2**33),
    }
    ray = [sys.executable, "-m", "services.forkserver.start_ray", "start"]
    flags = ["--head", "--block", "--disable-usage-stats", "--no-monitor"]
    return [*ray, *flags, *(f"--{name}={value}" for name, value in options.items())]


def _environment(head: RayHead, token_file: Path, ports: list[int]) -> dict[str, str]:
    kept_out = {"RAY_ADDRESS", "RAY_AUTH_TOKEN"} | Settings.secret_variables()  # no process of a node reads these
    inherited = {name: value for name, value in os.environ.items() if name.upper() not in kept_out}
    return inherited | {
        **NOTICE_CUTS,
        MARK: head.mark,
        forkserver.VARIABLE: f"{head.folder}/fork.sock",
        "SPT_NOENV": "1",  # workers rename themselves; otherwise the new name overwrites the mark
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "TMPDIR": head.folder,  # files that killed processes leave behind are removed with the folder
        "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}",  # keeps compiled code
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray replaces 127.0.0.1 by an address of the network
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else, under `uv run`, jobs would pack the caller's folder
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # one node has nowhere to drain to
        "RAY_USAGE_STATS_ENABLED": "0",
        "DASHBOARD_METRIC_PORT": str(ports[-1]),
    }


def _adoptable(head: RayHead, token_file: Path) -> bool:
    same = head.ray_version == version("ray") and head.python == sys.executable
    return same and bool(processes_with(head.mark)) and _answers(head, token_file)


def _answers(head: RayHead, token_file: Path) -> bool:
    """Whether jobs can be submitted to the Ray head node: its dashboard and its agent must both answer. `token_file`
    has the token that Ray's clients need."""
    headers = {"Authorization": f"Bearer {token_file.read_text()}"}
    probes = [f"{head.url}/api/jobs/", f"http://127.0.0.1:{head.agent_port}/api/local_raylet_healthz"]
    try:
        return all(httpx.get(probe, headers=headers, timeout=5, trust_env=False).is_success for probe in probes)
    except httpx.HTTPError:
        return False


def processes_with(mark: str) -> list[psutil.Process]:
    """Returns the processes of the Ray head whose environment bears the mark `mark`: its servers, workers and jobs."""
    marked = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                marked.append(process)
        except (psutil.Error, OSError):  # the process has ended, or belongs to another user
            continue
    return marked


def _terminate(processes: list[psutil.Process], seconds: float) -> None:
    """Ends the processes with SIGTERM, and those that still run after `seconds` with SIGKILL."""
    for send in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            try:
                send(process)
            except psutil.NoSuchProcess:
                continue
        _, processes = psutil.wait_procs(processes, timeout=seconds)


def _free_ports(count: int) -> list[int]:
    """Returns `count` TCP ports that no program uses.

    The ports are below the range from which operating systems assign ports, so that the system gives none of them to
    another process.
    """
    ports: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1_000):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise StackError(
        f"Ray needs {count} free TCP ports between 20000 and 32000, but fewer are free; end programs that use some."
    )


def _read(home: Path) -> RayHead | None:
    try:
        return RayHead(**json.loads((home / "stack.json").read_text()))
    except FileNotFoundError:
        return None


def _write(home: Path, head: RayHead) -> None:
    beside = home / ".stack.json"
    beside.write_text(json.dumps(asdict(head), indent=1))
    beside.rename(home / "stack.json")


def _keep_logs(folder: Path, target: Path) -> None:
    logs = folder / "ray" / "session_latest" / "logs"
    if logs.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(logs, target)
        target.chmod(0o700)  # Ray opens the folder to all users


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])

"""Measures the control plane (the service's API process) under load from `wrk`: job submissions and reads of a job's
status.

    python benchmarks/service/load.py --control-planes 2

PostgreSQL runs on the same machine. Every job stays queued, because Ray does not run. `wrk` (a Debian package) runs as
a separate process; the benchmark also prints how many cores `wrk` uses.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from services.local.postgres import start_postgres, stop_postgres

KEY = "rd-benchmark"
STATUS = 'wrk.headers["Authorization"] = "Bearer {key}"'
SUBMIT = """
wrk.method = "POST"
wrk.headers["Authorization"] = "Bearer {key}"
wrk.headers["Content-Type"] = "application/json"
local n = 0
request = function()
  n = n + 1
  local body = '{{"model":"tiny","training_file":"{file}","method":{{"type":"dpo"}},"suffix":"n%d"}}'
  return wrk.format(nil, nil, nil, string.format(body, n))
end
"""
PAIR = '{"prompt": "What is %d plus 1?", "chosen": "It is %d.", "rejected": "No idea."}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20, help="Duration of each measurement. Default: %(default)s.")
    connections = "Number of connections to each control plane. Default: %(default)s."
    parser.add_argument("--connections", type=int, default=16, help=connections)
    control_planes = "Number of control planes that share one database. Default: %(default)s."
    parser.add_argument("--control-planes", type=int, default=1, help=control_planes)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raydpo-load-") as folder, ExitStack() as stops:
        os.chmod(folder, 0o755)
        home = Path(folder).resolve()
        stops.callback(stop_postgres, home / "postgres")
        database_url = start_postgres(home / "postgres")
        start(home, database_url, "first").stop()
        services = [start(home, database_url, f"home-{number}") for number in range(options.control_planes)]
        for service in services:
            stops.callback(service.stop)
        measure(services, options)


@dataclass
class Service:
    """A control plane's process and the base URL of the API that the process serves."""

    process: psutil.Popen
    url: str

    def megabytes(self) -> float:
        return self.process.memory_info().rss / 2**20

    def seconds(self) -> float:
        """Returns the CPU seconds that the process has used."""
        return sum(self.process.cpu_times()[:2])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def start(home: Path, database_url: str, name: str) -> Service:
    environment = os.environ | {
        "DATABASE_URL": database_url,
        "RAYDPO_API_KEY": KEY,
        "RAYDPO_HOME": str(home / name),
        "RAYDPO_STORAGE_URL": (home / "storage").as_uri(),
        "PYTHONPATH": os.getcwd(),
    }
    program = "from services.cli.app import app; app()"
    up = ["up", "--port=0", "--ray-address=http://127.0.0.1:9", "--model=tiny=hub/tiny"]
    began = time.monotonic()
    process = psutil.Popen([sys.executable, "-c", program, *up], env=environment, stdout=subprocess.PIPE, text=True)
    service = Service(process, process.stdout.readline().split()[-1])
    print(f"{name}: ready after {time.monotonic() - began:.2f} s, {service.megabytes():.0f} MB")
    return service


def measure(services: Sequence[Service], options: argparse.Namespace) -> None:
    url, headers = services[0].url, {"Authorization": f"Bearer {KEY}"}
    rows = "".join(PAIR % (number, number + 1) for number in range(12)).encode()
    file = httpx.post(f"{url}/files", headers=headers, files={"file": ("p.jsonl", rows)}, data={"purpose": "fine-tune"})
    body = {"model": "tiny", "training_file": file.json()["id"], "method": {"type": "dpo"}}
    job = httpx.post(f"{url}/fine_tuning/jobs", headers=headers, json=body).json()
    print(f"{'':8} {'per s':>8} {'p50 ms':>8} {'p99 ms':>8} {'errors':>7} {'cores: services':>16} {'wrk':>6}")
    show("status", f"/fine_tuning/jobs/{job['id']}", STATUS.format(key=KEY), services, options)
    show("submit", "/fine_tuning/jobs", SUBMIT.format(key=KEY, file=file.json()["id"]), services, options)
    print("then " + ", ".join(f"{service.megabytes():.0f} MB" for service in services))


def show(name: str, path: str, script: str, services: Sequence[Service], options: argparse.Namespace) -> None:
    """Sends the same requests with `wrk` to all services at the same time, and prints the results in a line that begins
    with `name`.

    `script` is the Lua script with which `wrk` makes the requests to `path`. The rate and the errors are sums over the
    services; the latencies are those of the slowest service.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        wrk = ["wrk", "-t1", f"-c{options.connections}", f"-d{options.seconds}", "--latency", "-s", file.name]
        before, wrk_before = sum(service.seconds() for service in services), children_seconds()
        running = [
            subprocess.Popen([*wrk, service.url + path], stdout=subprocess.PIPE, text=True) for service in services
        ]
        reports = [process.communicate()[0] for process in running]
        spent = sum(service.seconds() for service in services) - before
        wrk_spent = children_seconds() - wrk_before
    rate = sum(float(re.search(r"Requests/sec:\s+([\d.]+)", report)[1]) for report in reports)
    p50, p99 = (
        max(milliseconds(re.search(rf"\n\s+{share}%\s+(\S+)", report)[1]) for report in reports) for share in (50, 99)
    )
    errors = sum(int(number) for report in reports for number in re.findall(r"Non-2xx or 3xx responses: (\d+)", report))
    cores = spent / options.seconds, wrk_spent / options.seconds
    print(f"{name:8} {rate:8.0f} {p50:8.1f} {p99:8.1f} {errors:>7} {cores[0]:16.2f} {cores[1]:6.2f}")


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def milliseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()
    return float(number) * {"us": 1e-3, "ms": 1, "s": 1e3, "m": 6e4}[unit]


if __name__ == "__main__":
    main()

"""The control plane under load: submissions and reads of a job's status, with PostgreSQL beside it, by `wrk`.

Nothing trains: no Ray answers, so every job stays queued. `wrk` (Debian's package) is another process, whose own
share of the cores is printed too.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--connections", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raydpo-load-") as folder:
        os.chmod(folder, 0o755)
        home = Path(folder).resolve()
        database_url = start_postgres(home / "postgres")
        began = time.monotonic()
        service, url = start(home, database_url)
        print(f"ready after {time.monotonic() - began:.2f} s, {resident(service):.0f} MB")
        try:
            measure(url, service, options)
        finally:
            service.terminate()
            service.wait(30)
            stop_postgres(home / "postgres")


def start(home: Path, database_url: str) -> tuple[psutil.Popen, str]:
    environment = os.environ | {
        "DATABASE_URL": database_url,
        "RAYDPO_API_KEY": KEY,
        "RAYDPO_HOME": str(home / "home"),
        "RAYDPO_STORAGE_URL": (home / "storage").as_uri(),
        "PYTHONPATH": os.getcwd(),
    }
    (home / "home").mkdir()
    program = "from services.cli.app import app; app()"
    command = [
        sys.executable,
        "-c",
        program,
        "up",
        "--port=0",
        "--ray-address=http://127.0.0.1:9",
        "--model=tiny=hub/tiny",
    ]
    service = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    return service, service.stdout.readline().split()[-1]


def resident(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def measure(url: str, service: psutil.Popen, options: argparse.Namespace) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    rows = "".join(PAIR % (number, number + 1) for number in range(12)).encode()
    file = httpx.post(f"{url}/files", headers=headers, files={"file": ("p.jsonl", rows)}, data={"purpose": "fine-tune"})
    body = {"model": "tiny", "training_file": file.json()["id"], "method": {"type": "dpo"}}
    job = httpx.post(f"{url}/fine_tuning/jobs", headers=headers, json=body).json()
    print(f"{'':8} {'per s':>8} {'p50 ms':>8} {'p99 ms':>8} {'errors':>7} {'cores: service':>15} {'wrk':>6}")
    show("status", f"{url}/fine_tuning/jobs/{job['id']}", STATUS.format(key=KEY), service, options)
    show("submit", f"{url}/fine_tuning/jobs", SUBMIT.format(key=KEY, file=file.json()["id"]), service, options)
    print(f"then {resident(service):.0f} MB")


def show(name: str, url: str, script: str, service: psutil.Popen, options: argparse.Namespace) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        command = ["wrk", "-t1", f"-c{options.connections}", f"-d{options.seconds}", "--latency", "-s", file.name, url]
        before, own = sum(service.cpu_times()[:2]), children_seconds()
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spent, own = sum(service.cpu_times()[:2]) - before, children_seconds() - own
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", report)[1])
    p50, p99 = (milliseconds(re.search(rf"{share}%\s+(\S+)", report)[1]) for share in (50, 99))
    errors = re.search(r"Non-2xx or 3xx responses: (\d+)", report)
    per_second = spent / options.seconds, own / options.seconds
    shown = f"{rate:8.0f} {p50:8.1f} {p99:8.1f} {errors[1] if errors else 0:>7}"
    print(f"{name:8} {shown} {per_second[0]:15.2f} {per_second[1]:6.2f}")


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def milliseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()
    return float(number) * {"us": 1e-3, "ms": 1, "s": 1e3, "m": 6e4}[unit]


if __name__ == "__main__":
    main()

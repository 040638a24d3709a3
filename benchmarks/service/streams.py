"""Opens many event streams on one control plane (the service's API process), and measures lost events, latency and
memory per stream.

The control plane, the process that posts events and the process that reads the streams are separate processes. One
stream in a hundred is not read until all events have been posted.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import re
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles

import httpx
import psutil
import psycopg

from services.contract import EventBatch, JobEvent, Message

EVENT = re.compile(rb'"message":"(\d+) ([\d.]+) ')
PADDING = "x" * 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    jobs = "Number of jobs whose events are streamed. Default: %(default)s."
    per_second = "Number of events of each job that are posted per second. Default: %(default)s."
    slow = "Share of the streams that are read only after all events are posted. Default: %(default)s."
    parser.add_argument("--streams", type=int, default=10_000, help="Number of streams. Default: %(default)s.")
    parser.add_argument("--jobs", type=int, default=1, help=jobs)
    parser.add_argument("--events", type=int, default=60, help="Number of events per job. Default: %(default)s.")
    parser.add_argument("--per-second", type=float, default=1.0, help=per_second)
    parser.add_argument("--slow", type=float, default=0.01, help=slow)
    options = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with tempfile.TemporaryDirectory(prefix="raydpo-streams-", ignore_cleanup_errors=True) as folder:
        home = Path(folder).resolve()
        model = home / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        up = f"up --home {home} --port 0 --ray-address http://127.0.0.1:9 --model tiny={model}".split()
        program = "from services.cli.app import app; app()"
        server = subprocess.Popen([sys.executable, "-c", program, *up], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            while "base models" not in (line := server.stdout.readline()):
                assert line, "the service did not start"
            measure(options, home, psutil.Process(server.pid))
        finally:
            server.terminate()
            server.wait()


def measure(options: argparse.Namespace, home: Path, server: psutil.Process) -> None:
    url, key = (home / "url").read_text(), (home / "api.key").read_text()
    jobs = submit(url, key, options.jobs)
    tokens = open_attempts(database_url(home), jobs)
    before = server.memory_info().rss
    print(f"server: {before / 2**20:.0f} MiB without a stream")
    stop = multiprocessing.Event()
    results: multiprocessing.Queue[dict[str, float]] = multiprocessing.Queue()
    reading = multiprocessing.Process(target=read_all, args=(options, url, key, jobs, stop, results), daemon=True)
    reading.start()
    opened = results.get()
    print(f"{options.streams} streams opened in {opened['seconds']:.1f} s")
    time.sleep(2)
    idle = server.memory_info().rss
    print(f"server: {(idle - before) / options.streams * 1000 / 2**20:.1f} MiB per 1,000 idle streams")
    busy = server.cpu_times()
    began = time.monotonic()
    write_all(options, url, tokens, key)
    seconds = time.monotonic() - began
    used = server.cpu_times()
    stop.set()
    figures = results.get()
    peak = server.memory_info().rss
    share = (used.user + used.system - busy.user - busy.system) / seconds
    print(f"server: {share:.0%} of a core, {(peak - before) / 2**20:.0f} MiB more than without streams at the end")
    print(json.dumps(figures, indent=1))
    reading.join()


def submit(url: str, key: str, count: int) -> list[str]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False) as http:
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        rows = "\n".join(json.dumps(row) for _ in range(10)).encode()
        file = http.post("/files", files={"file": ("rows.jsonl", rows)}, data={"purpose": "fine-tune"}).json()
        body = {"model": "tiny", "training_file": file["id"]}
        return [http.post("/fine_tuning/jobs", json=body).json()["id"] for _ in range(count)]


def open_attempts(url: str, jobs: list[str]) -> dict[str, str]:
    """Inserts a first attempt (run) of each of `jobs` into the database at `url`, because no Ray runs that could start
    an attempt.

    Returns the token of each attempt by the id of the job.
    """
    tokens = {job: secrets.token_hex(16) for job in jobs}
    with psycopg.connect(url) as connection:
        for job, token in tokens.items():
            connection.execute(
                "INSERT INTO attempts (job_id, number, state, token, next_seq, num_accelerators, failed)"
                " VALUES (%s, 1, 'running', %s, 0, 0, false)",
                (job, token),
            )
    return tokens


def database_url(home: Path) -> str:
    from services.local.postgres import start_postgres

    return start_postgres(home / "postgres")  # returns the URL of the PostgreSQL that already runs there


def write_all(options: argparse.Namespace, url: str, tokens: dict[str, str], key: str) -> None:
    """Posts the events of all jobs, as running jobs do, and measures how long a client waits meanwhile to retrieve a
    job. `tokens` has the token of each job's attempt (run), by the id of the job."""
    root = url.removesuffix("/v1")
    began = time.monotonic()
    waited = []
    with httpx.Client(trust_env=False, timeout=60) as http:
        for seq in range(options.events):
            for job, token in tokens.items():
                report = Message(message=f"{seq} {time.time()} {PADDING}")
                batch = EventBatch(events=[JobEvent(seq=seq, created_at=time.time(), report=report)])
                answer = http.post(
                    f"{root}/internal/attempts/{job}/1/events",
                    content=batch.model_dump_json(),
                    headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
                )
                assert answer.is_success, answer.text
            asked_at = time.monotonic()
            http.get(f"{url}/fine_tuning/jobs/{next(iter(tokens))}", headers={"Authorization": f"Bearer {key}"})
            waited.append(time.monotonic() - asked_at)
            time.sleep(max(0.0, began + (seq + 1) / options.per_second - time.monotonic()))
    print(
        f"meanwhile a job is retrieved in {sorted(waited)[len(waited) // 2] * 1000:.0f} ms, at most {max(waited):.2f} s"
    )


class Reader(asyncio.Protocol):
    """A client that reads one event stream. It counts the events whose number is not the expected next one, because
    they are lost, repeated or out of order."""

    latencies: list[float] = []  # noqa: RUF012

    def __init__(self, request: bytes, *, slow: bool) -> None:
        self.request, self.slow = request, slow
        self.buffer = b""
        self.next = self.wrong = 0
        self.opened = False
        self.ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if not self.opened:
            self.opened = b"fine_tuning.job.progress" in data
            if self.opened and self.slow:
                self.transport.pause_reading()
        end = data.rfind(b"\n\n")
        if end < 0:
            self.buffer += data
            return
        text, self.buffer = self.buffer + data[:end], data[end:]
        now = time.time()
        for match in EVENT.finditer(text):
            self.wrong += int(match[1]) != self.next
            self.next += 1
            if not self.slow:
                self.latencies.append(now - float(match[2]))

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = True


def read_all(options, url, key, jobs, stop, results) -> None:
    asyncio.run(read(options, url, key, jobs, stop, results))


async def read(options, url, key, jobs, stop, results) -> None:
    loop = asyncio.get_running_loop()
    host, port = url.split("/")[2].split(":")
    number_slow = round(options.streams * options.slow)
    slow = set(random.sample(range(options.streams), number_slow))
    began = time.monotonic()
    readers: list[Reader] = []
    turns = asyncio.Semaphore(200)

    async def connect(number: int) -> None:
        path = f"/v1/x/jobs/{jobs[number % len(jobs)]}/stream"
        request = f"GET {path} HTTP/1.1\r\nHost: raydpo\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        async with turns:
            connection = socket.socket()
            connection.setblocking(False)
            if number in slow:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(connection, (host, int(port)))
            _, reader = await loop.create_connection(lambda: Reader(request, slow=number in slow), sock=connection)
            readers.append(reader)
            while not reader.opened:
                assert not reader.ended, "a stream was refused"
                await asyncio.sleep(0.02)

    await asyncio.gather(*(connect(number) for number in range(options.streams)))
    results.put({"seconds": time.monotonic() - began})
    await asyncio.to_thread(stop.wait)
    for reader in readers:
        if reader.slow:
            reader.transport.resume_reading()
    for _ in range(300):
        if all(reader.next == options.events for reader in readers):
            break
        await asyncio.sleep(0.2)
    cuts = quantiles(Reader.latencies, n=100)
    results.put(
        {
            "events delivered": sum(reader.next for reader in readers),
            "of": options.events * options.streams,
            "streams with a gap or a repetition": sum(reader.wrong > 0 for reader in readers),
            "streams that ended": sum(reader.ended for reader in readers),
            "slow streams": number_slow,
            "latency p50 s": round(cuts[49], 3),
            "latency p99 s": round(cuts[98], 3),
            "latency max s": round(max(Reader.latencies), 3),
        }
    )


if __name__ == "__main__":
    main()

"""Measures how much time and CPU the control plane adds to streamed answers. Clients ask the engine for the same
streams in two ways: directly, and through the control plane.

    python -m benchmarks.service.gateway --streams 32 --per-second 50

The engine is a process that sends answers in vLLM's format at a set speed, and uses little CPU. With `--engine vllm`,
the engine is vLLM on the CPU with a small random model, in a complete service; both ways then lead through Ray Serve's
proxy. vLLM's engine gets the machine's first core, and all other processes get the other cores. The reason is that an
engine on a GPU does not share its processor with the control plane either.

In a round, all clients use the same way; the next round uses the other way. Each client sends a few requests in a
round, the next one as soon as the answer before it has ended. The clients start one after the other, spread over the
time of an answer.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from services.local.postgres import start_postgres, stop_postgres
from services.local.ray_head import processes_with
from tests.e2e.conftest import running_service, tiny_model, wait_for
from tests.e2e.test_kills import engine as engine_of
from tests.e2e.test_kills import replica
from tests.services.control_plane.conftest import FakeRay, free_port

KEY = "rd-benchmark"
CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": True, "ignore_eos": True}

Processes = dict[str, list[psutil.Process]]  # by what they do


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32, help="Number of streams. Default: %(default)s.")
    rate = "Tokens per second of each stream; 0 means as fast as possible. Default: %(default)s."
    parser.add_argument("--per-second", type=float, default=50.0, help=rate)
    parser.add_argument(
        "--tokens", type=int, default=250, help="Number of tokens of each stream. Default: %(default)s."
    )
    parser.add_argument(
        "--answers",
        type=int,
        default=3,
        help="Number of answers that a client asks for in a round. Default: %(default)s.",
    )
    parser.add_argument("--rounds", type=int, default=3, help="Number of rounds of each way. Default: %(default)s.")
    parser.add_argument("--engine", choices=("stand-in", "vllm"), default="stand-in", help="Default: %(default)s.")
    options = parser.parse_args()
    with ExitStack() as stops:
        begin = service_with_vllm if options.engine == "vllm" else service_with_stand_in
        ways, processes = stops.enter_context(begin(options))
        processes["client"] = [psutil.Process()]
        for _ in range(options.rounds):
            for way in ways.values():
                before = cpu_seconds(processes)
                way.rounds.append(asyncio.run(ask_all(way, options)))
                for name, seconds in cpu_seconds(processes).items():
                    way.cpu_seconds[name] += seconds - before[name]
        report(ways, options)


@contextmanager
def service_with_stand_in(options: argparse.Namespace) -> Iterator[tuple[dict[str, "Way"], Processes]]:
    """Starts a stand-in for the engine, and a control plane.

    Yields two dictionaries: the two ways to the engine by name ("direct", and "gateway" through the control plane), and
    the control plane's process, under the name "control plane".
    """
    engine_port = free_port()
    with engine(engine_port, options), control_plane(engine_port) as (service, process):
        ways = {"direct": Way(f"127.0.0.1:{engine_port}", f"/any{CHAT}", KEY), "gateway": Way(service, CHAT, KEY)}
        asyncio.run(ask(ways["gateway"], 1))  # has the model loaded
        yield ways, {"control plane": [process]}


@contextmanager
def service_with_vllm(options: argparse.Namespace) -> Iterator[tuple[dict[str, "Way"], Processes]]:
    """Starts `raydpo up` with a small model.

    Yields two dictionaries: the two ways to the engine by name ("direct", and "gateway" through the control plane), and
    the service's processes by what they do, such as "engine" and "proxy".
    """
    with running_service(lambda folder: {"tiny": tiny_model(folder / "tiny")}) as service:
        assert service.process is not None
        gateway = Way(service.url.removeprefix("http://"), CHAT, service.key)
        one = {"json": BODY | {"max_tokens": 1}, "headers": {"Authorization": f"Bearer {service.key}"}, "timeout": 300}
        wait_for(lambda: httpx.post(f"{service.url}{CHAT}", **one).is_success, "the model is loaded")
        head = json.loads((service.home / "stack.json").read_text())
        token = {"Authorization": f"Bearer {(service.home / 'ray.token').read_text()}"}
        told = httpx.get(f"http://127.0.0.1:{head['dashboard_port']}/api/serve/applications/", headers=token)
        (app,) = told.json()["applications"]
        direct = Way(f"127.0.0.1:{head['serve_port']}", f"/{app}{CHAT}", service.key)
        control_plane, served = psutil.Process(service.process.pid), engine_of(service)
        separate(served, [psutil.Process(), control_plane, *processes_with(head["mark"])])
        for _ in range(3):  # warms the engine up
            asyncio.run(ask_all(direct, options))
        processes = {"control plane": [control_plane], "engine": [served], "replica": [replica(service)]}
        processes["proxy"] = service.processes("ray::ProxyActor")
        yield {"direct": direct, "gateway": gateway}, processes


def separate(served: psutil.Process, others: Iterable[psutil.Process]) -> None:
    """Gives vLLM's engine `served`, the process that computes, the machine's first core, and all other processes the
    other cores. The engine may be one of `others`."""
    first, *rest = sorted(os.sched_getaffinity(0))
    for process in others:
        for thread in process.threads():
            with suppress(OSError):  # the thread has ended
                os.sched_setaffinity(thread.id, [first] if process == served else rest)


def cpu_seconds(processes: Processes) -> dict[str, float]:
    """Returns the CPU seconds that the processes have used so far: a sum for each key of `processes`, which names what
    its processes do, such as "control plane"."""
    return {name: sum(sum(each.cpu_times()[:2]) for each in group) for name, group in processes.items()}


@contextmanager
def engine(port: int, options: argparse.Namespace) -> Iterator[None]:
    command = [sys.executable, __file__, "engine", str(port), str(options.per_second), str(options.tokens)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()})
    try:
        wait_for(lambda: listens(port), "the engine listens")
        yield
    finally:
        process.terminate()
        process.wait()


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextmanager
def control_plane(engine_port: int) -> Iterator[tuple[str, psutil.Process]]:
    """Starts a control plane that reaches the engine at `engine_port` in place of Ray Serve. Yields the control plane's
    address and its process."""
    with tempfile.TemporaryDirectory(prefix="raydpo-gateway-") as folder, ExitStack() as stops:
        os.chmod(folder, 0o755)
        home = Path(folder).resolve()
        stops.callback(stop_postgres, home / "postgres")
        environment = os.environ | {
            "DATABASE_URL": start_postgres(home / "postgres"),
            "RAYDPO_API_KEY": KEY,
            "RAYDPO_HOME": str(home),
            "RAYDPO_STORAGE_URL": (home / "storage").as_uri(),
            "RAYDPO_SERVE_URL": f"http://127.0.0.1:{engine_port}",
            "PYTHONPATH": os.getcwd(),
        }
        ray = FakeRay()
        stops.callback(ray.server.server_close)
        stops.callback(ray.server.shutdown)
        program = "from services.cli.app import app; app()"
        address = f"--ray-address=http://127.0.0.1:{ray.server.server_port}"
        up = ["up", "--port=0", address, "--model=tiny=hub/tiny"]
        process = psutil.Popen([sys.executable, "-c", program, *up], env=environment, stdout=subprocess.PIPE, text=True)
        stops.callback(process.wait)
        stops.callback(process.terminate)
        yield process.stdout.readline().split("/")[2], process


# --- asking ------------------------------------------------------------------------------------


@dataclass
class Stream:
    """Measurements of one streamed answer: its number of tokens, the time of its `first` token, and the time until its
    end (`seconds`). Both times are in seconds since the client's request."""

    tokens: int
    first: float
    seconds: float


class Way:
    """One of the two ways to the engine (direct, or through the control plane), with the measurements that were made on
    it."""

    def __init__(self, address: str, path: str, key: str) -> None:
        self.host, _, port = address.partition(":")
        self.port, self.path, self.key = int(port), path, key
        self.rounds: list[list[Stream]] = []
        self.cpu_seconds = defaultdict[str, float](float)  # of all rounds, by what the processes do

    def rates(self) -> list[float]:
        """Returns the speed in each round: the median over the round's streams, in tokens per second."""
        return [median(stream.tokens / stream.seconds for stream in each) for each in self.rounds]

    def tokens(self) -> int:
        return sum(stream.tokens for each in self.rounds for stream in each)

    def first(self) -> float:
        return median(stream.first for each in self.rounds for stream in each)


async def ask_all(way: Way, options: argparse.Namespace) -> list[Stream]:
    spread = options.tokens / (options.per_second or 1000) / options.streams

    async def client(number: int) -> list[Stream]:
        await asyncio.sleep(number * spread)
        return [await ask(way, options.tokens) for _ in range(options.answers)]

    return [stream for each in await asyncio.gather(*map(client, range(options.streams))) for stream in each]


async def ask(way: Way, tokens: int) -> Stream:
    """Sends one request by `way` for an answer of `tokens` tokens, reads the stream to its end, and returns the
    measurements. Does little else, so that the clients use as little CPU as possible."""
    reader, writer = await asyncio.open_connection(way.host, way.port)
    body = json.dumps(BODY | {"max_tokens": tokens}).encode()
    head = f"POST {way.path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {way.key}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    began = time.monotonic()
    writer.write(head.encode() + body)
    seen, first, got = b"", 0.0, 0
    while piece := await reader.read(1 << 16):
        seen = seen[-20:] + piece
        got += piece.count(b'"delta"')
        if got and not first:
            first = time.monotonic() - began
    writer.close()
    assert b"[DONE]" in seen, seen
    return Stream(got, first, time.monotonic() - began)


def report(ways: dict[str, Way], options: argparse.Namespace) -> None:
    direct, gateway = ways["direct"], ways["gateway"]
    for name, way in ways.items():
        rates = ", ".join(f"{rate:.2f}" for rate in way.rates())
        print(f"{name:8} {rates} tokens/s of a stream, first token after {1000 * way.first():.1f} ms at the median")
    print(f"ratio of tokens/s: {median(gateway.rates()) / median(direct.rates()):.3f}")
    print(f"added to the first token: {1000 * (gateway.first() - direct.first()):.1f} ms")
    for part in gateway.cpu_seconds:
        spent = ", ".join(f"{name} {1e6 * way.cpu_seconds[part] / way.tokens():.0f}" for name, way in ways.items())
        print(f"CPU of the {part}, µs a chunk: {spent}")


# --- the engine --------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def event(number: int) -> bytes:
    """Returns chunk number `number` of a streamed answer, in vLLM's format."""
    chunk = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    choice = {"index": 0, "delta": {"content": f" word{number}"}, "logprobs": None, "finish_reason": None}
    return b"data: " + json.dumps(chunk | {"choices": [choice]}).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    chunk = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    counts = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
    return b"data: " + json.dumps(chunk | {"choices": [], "usage": counts}).encode() + b"\n\n"


async def run_engine(port: int, per_second: float, tokens: int) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):  # the client closes the connection
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await write(writer, json.loads(await reader.readexactly(length)))
                if b"connection: close" in head.lower():
                    break
        writer.close()

    async def write(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(HEAD)
        began, asked = time.monotonic(), min(tokens, body["max_tokens"])
        for number in range(asked):
            data = event(number)
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
            if per_second:
                await asyncio.sleep(max(0.0, began + (number + 1) / per_second - time.monotonic()))
        wants_usage = (body.get("stream_options") or {}).get("include_usage")
        end = (usage(asked) if wants_usage else b"") + b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(end), end))
        await writer.drain()

    async with await asyncio.start_server(answer, "127.0.0.1", port, backlog=1000):
        await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        asyncio.run(run_engine(int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
    else:
        main()

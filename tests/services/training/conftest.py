"""Provides a stand-in for the control plane, a small model, pairs to train on, and a Ray cluster."""

import functools
import json
import os
import secrets
import shutil
import string
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_core.config import TrainConfig
from services import forkserver
from services.contract import OWN_TOKEN_HEADER, AttemptSpec, Desired, EventBatch, Report, Wish
from tests.dpo_core.conftest import build_policy, build_tokenizer
from tests.dpo_core.encoding.test_encode import HERMES_TEMPLATE
from tests.services.training.attempt import Driver
from tests.services.web import running

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401 - its own models use what pydantic has deprecated


ROOT = Path(__file__).parents[3]


class ControlPlane(ThreadingHTTPServer):
    """An HTTP server that receives an attempt's reports on loopback, and answers as a test wants.

    `script` holds the next answers: a status, or None to take the reports and drop the answer.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/events"
        self.script: list[int | None] = []
        self.default = 200
        self.desired: Desired = "run"
        self.token = "token-of-the-attempt"
        self.tokens: set[str] = set()
        self.own_tokens: set[str] = set()  # that came with a launch's
        self.posts: list[EventBatch] = []

    def seqs(self) -> list[int]:
        """Returns the numbers of the events that arrived, in order of arrival, without repetitions."""
        return list(dict.fromkeys(event.seq for batch in self.posts for event in batch.events))

    def reports(self) -> list[Report]:
        events = {event.seq: event.report for batch in self.posts for event in batch.events}
        return [events[seq] for seq in sorted(events)]


class Handler(BaseHTTPRequestHandler):
    server: ControlPlane

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.server.script.pop(0) if self.server.script else self.server.default
        if answer is None or answer < 300:
            self.server.tokens.add(self.headers["Authorization"])
            if own_token := self.headers[OWN_TOKEN_HEADER]:
                self.server.own_tokens.add(own_token)
            self.server.posts.append(EventBatch.model_validate_json(body))
        if answer is None:
            self.connection.close()
            return
        wish = Wish(desired=self.server.desired).model_dump_json().encode()
        self.send_response(answer)
        self.send_header("Content-Length", str(len(wish)))
        self.end_headers()
        self.wfile.write(wish)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ValueError, OSError):  # the connection that was dropped
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def control_plane() -> Iterator[ControlPlane]:
    with running(ControlPlane()) as server:
        yield server


@pytest.fixture(scope="module")
def lasting_control_plane() -> Iterator[ControlPlane]:
    with running(ControlPlane()) as server:
        yield server


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_model(folder: Path, seed: int) -> str:
    """Writes a two-layer Llama with 128 positions and a tokenizer of single characters to the folder, and returns its
    path."""
    letters = {token: i for i, token in enumerate(["</s>", "<|user|>", "<|assistant|>", *string.printable])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=CHAT_TEMPLATE)
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(letters), max_position_embeddings=128, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="session")
def byte_level_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the folder of a small model whose tokenizer knows every character and whose chat template writes
    tools."""
    folder = str(tmp_path_factory.mktemp("model"))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = HERMES_TEMPLATE
    tokenizer.save_pretrained(folder)
    build_policy(initializer_range=0.02).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_model_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_model(tmp_path_factory.mktemp("other"), seed=1)


def build_pair(number: int) -> dict[str, Any]:
    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return {
        "input": {"messages": message("user", f"What is {number} and {number % 7}?")},
        "preferred_output": message("assistant", f"It is {number + number % 7}."),
        "non_preferred_output": message("assistant", "no idea" + "!" * (number % 5)),
    }


@pytest.fixture(scope="session")
def make_pair() -> Callable[[int], dict[str, Any]]:
    return build_pair


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the URI of a file of 24 short pairs."""
    file = tmp_path_factory.mktemp("files") / "pairs.jsonl"
    file.write_text("".join(json.dumps(build_pair(number)) + "\n" for number in range(24)))
    return file.as_uri()


@pytest.fixture(scope="session")
def make_spec_in(model_source: str, pairs: str) -> Callable[..., AttemptSpec]:
    """Returns a function that makes the settings of an attempt with one worker on `pairs`, in a given folder.

    Keywords replace fields of the settings.
    """

    def make(folder: Path, **fields: Any) -> AttemptSpec:
        given: dict[str, Any] = {
            "job_id": "ftjob-1",
            "attempt": 1,
            "config": TrainConfig(),
            "num_workers": 1,
            "training_uri": pairs,
            "model_source": model_source,
            "run_uri": (folder / "run").as_uri(),
            "cache_uri": (folder / "cache").as_uri(),
            "reference_source": "serve",  # where there is a reference
            "events_url": "http://127.0.0.1:9/events",
        }
        return AttemptSpec(**(given | fields))

    return make


@pytest.fixture
def make_spec(tmp_path: Path, make_spec_in: Callable[..., AttemptSpec]) -> Callable[..., AttemptSpec]:
    return functools.partial(make_spec_in, tmp_path)


@pytest.fixture(scope="session")
def ray_environment(model_source: str) -> Iterator[dict[str, str]]:
    """Starts a Ray cluster, and returns the environment variables with which the main programs of jobs find it."""
    with ray_cluster(model_source, RAY_memory_monitor_refresh_ms="0") as environment:
        yield environment


@contextmanager
def ray_cluster(model_source: str, **settings: str) -> Iterator[dict[str, str]]:
    """Starts a Ray cluster with these settings of Ray, and yields the environment variables for programs on it.

    The path of its folder is short, because it contains sockets.
    """
    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")
    environment = os.environ | {
        forkserver.VARIABLE: f"{folder}/fork.sock",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": folder,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        **settings,
    }
    command = [sys.executable, str(Path(__file__).with_name("cluster.py")), folder, model_source]
    log = Path(folder, "cluster.log")
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as cluster,
    ):
        assert cluster.stdout
        address = next((line.split()[1] for line in cluster.stdout if line.startswith("address ")), None)
        assert address, log.read_text()
        try:
            yield environment | {"RAY_ADDRESS": address}
        finally:
            cluster.communicate(timeout=60)  # closes its standard input
            shutil.rmtree(folder, ignore_errors=True)  # the fork server takes its socket away meanwhile


@pytest.fixture
def start(ray_environment: dict[str, str], control_plane: Any) -> Iterator[Callable[[AttemptSpec], Driver]]:
    drivers: list[Driver] = []

    def start(spec: AttemptSpec) -> Driver:
        drivers.append(Driver(spec, ray_environment, control_plane.token))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.process.kill()
        driver.process.wait()

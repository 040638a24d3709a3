"""Tests that clients of streams get through the deaths of every process on their way: the engine, its replica, Serve's
controller and the control plane."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import psutil
import pytest

from tests.e2e.conftest import Service, running_service, tiny_model, wait_for
from tests.e2e.test_service import finished, messages, shop_pairs

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(3600)]

NUM_CLIENTS = 20


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(lambda folder: {"tiny": tiny_model(folder / "tiny")}) as service:
        yield service


class Client(threading.Thread):
    """Streams completions of a model one after the other, and keeps how each of them ended: `answered`, `error event`,
    `503`, `cut` if the connection broke, or else what came."""

    def __init__(self, service: Service, model: str, max_tokens: int = 100) -> None:
        super().__init__(daemon=True)
        self.service, self.model, self.max_tokens = service, model, max_tokens
        self.ends: list[tuple[float, str]] = []
        self.has_begun = False
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                end = self._ask()
            except httpx.TransportError:
                end = "cut"
            except ValueError as error:
                end = f"unreadable: {error}"
            self.ends.append((time.monotonic(), end))
            if end != "answered":
                time.sleep(0.5)

    def _ask(self) -> str:
        body = {"model": self.model, "prompt": "a", "max_tokens": self.max_tokens, "stream": True, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {self.service.key}"}
        with httpx.stream(
            "POST", f"{self.service.url}/v1/completions", json=body, headers=headers, timeout=300
        ) as answer:
            if answer.status_code == 503:
                answer.read()
                assert answer.json()["error"]["message"], answer.text
                return "503" if "retry-after" in answer.headers else "503 without retry-after"
            if answer.status_code != 200:
                return f"{answer.status_code}: {answer.read().decode()}"
            stream = b""
            for piece in answer.iter_bytes():
                self.has_begun, stream = True, stream + piece
        # Not with httpx's iter_lines, which also ends lines at other characters, such as U+2028 within a text.
        lines = [line.removeprefix(b"data: ") for line in stream.split(b"\n") if line.startswith(b"data: ")]
        events = [json.loads(line) for line in lines if line != b"[DONE]"]
        if any("error" in event for event in events):
            return "error event"
        return "answered" if lines[-1:] == [b"[DONE]"] else f"ended with {lines[-1:]}"

    def has_answered_since(self, moment: float) -> bool:
        return any(end == "answered" and at > moment for at, end in list(self.ends))


def replica(service: Service, model: str = "") -> psutil.Process:
    """Returns the process of the only replica; if `model` is given, of the only one of this base model."""
    found = service.processes("ray::ServeReplica")
    (replica,) = [each for each in found if f"-{model}" in " ".join(each.cmdline())]
    return replica


def engine(service: Service, model: str = "") -> psutil.Process:
    """Returns the process of the engine: a fork that the replica had made, so the first one since its request."""
    serves = replica(service, model)
    (client,) = [each for each in serves.children() if "multiprocessing.spawn" in " ".join(each.cmdline())]
    forks = [each for each in serves.parent().children() if "services.forkserver.server" in each.cmdline()]  # type: ignore[union-attr]
    return min((each for each in forks if each.create_time() >= client.create_time()), key=psutil.Process.create_time)


def controller(service: Service) -> psutil.Process:
    (found,) = service.processes("ray::ServeController")
    return found


def kill_control_plane(service: Service) -> None:
    service.kill()
    service.start()


VICTIMS: dict[str, Callable[[Service], object]] = {
    "engine": lambda service: engine(service).kill(),
    "replica": lambda service: replica(service).kill(),
    "controller": lambda service: controller(service).kill(),
    "control plane": kill_control_plane,
}


def train(client: openai.OpenAI, **options: Any) -> Any:
    """Runs a short job with these options of `x_raydpo`, and returns the job when it has succeeded."""
    file = client.files.create(file=("pairs.jsonl", shop_pairs(20)), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": 1, "batch_size": 10}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
        extra_body={"x_raydpo": {"reference": {"source": "trainer"}} | options},
    )
    done = finished(client, job.id)
    assert done.fine_tuned_model, messages(client, job.id)
    return done


@pytest.fixture(scope="module")
def policies(service: Service) -> tuple[str, str, str]:
    """Returns the name of an adapter, and the name and folder of another one that has answered and was deleted."""
    with service.client() as client:
        job = train(client)
        kept = job.fine_tuned_model
        checkpoint, *_ = client.fine_tuning.jobs.checkpoints.list(job.id).data
        deleted, folder = checkpoint.fine_tuned_model_checkpoint, service.home / "storage" / "runs" / job.id
        for model in (kept, deleted):
            assert client.completions.create(model=model, prompt="a", max_tokens=2).choices[0].text
        client.models.delete(deleted)
    return kept, deleted, str(folder / "export")  # the files that the deleted one had, too


@contextmanager
def clients(service: Service, *models: str, max_tokens: int = 100) -> Iterator[list[Client]]:
    """Runs NUM_CLIENTS clients, which ask the models in turn."""
    found = [Client(service, models[number % len(models)], max_tokens) for number in range(NUM_CLIENTS)]
    for client in found:
        client.start()
    try:
        yield found
    finally:
        for client in found:
            client.stopping.set()
        for client in found:
            client.join(300)


def answer_of_deleted(service: Service, name: str, folder: str) -> int:
    """Asks the replica itself for the deleted adapter, and returns the status of its answer."""
    head = json.loads((service.home / "stack.json").read_text())
    told = httpx.get(
        f"http://127.0.0.1:{head['dashboard_port']}/api/serve/applications/",
        headers={"Authorization": f"Bearer {(service.home / 'ray.token').read_text()}"},
        timeout=60,
    )
    (app,) = told.json()["applications"]
    url = f"http://127.0.0.1:{head['serve_port']}/{app}/v1/completions"
    headers = {"x-raydpo-adapter": quote(name), "x-raydpo-adapter-source": quote(Path(folder).as_uri())}
    return httpx.post(
        url, json={"model": name, "prompt": "a", "max_tokens": 1}, headers=headers, timeout=60
    ).status_code


@pytest.mark.parametrize("victim", VICTIMS)
def test_every_client_of_a_stream_gets_an_answer_after_a_death(
    service: Service, policies: tuple[str, str, str], victim: str
) -> None:
    kept, deleted, folder = policies
    with clients(service, "tiny", kept) as asking:
        wait_for(lambda: all(client.has_answered_since(0) for client in asking), "all have an answer")
        killed_at = time.monotonic()
        VICTIMS[victim](service)
        wait_for(lambda: all(client.has_answered_since(killed_at) for client in asking), "all have another one")
        time.sleep(5)
    ends = {end for client in asking for _, end in client.ends}
    assert ends <= {"answered", "error event", "503"} | ({"cut"} if victim == "control plane" else set())
    with service.client() as client, pytest.raises(openai.NotFoundError):
        client.completions.create(model=deleted, prompt="a", max_tokens=1)
    assert answer_of_deleted(service, deleted, folder) == 404
    assert answer_of_deleted(service, "ft:tiny:never-deleted", folder) == 200  # its files are there


def test_streams_of_an_adapter_end_when_it_is_deleted_and_others_go_on(
    service: Service, policies: tuple[str, str, str]
) -> None:
    kept, _, _ = policies
    check_deletion(service, kept)


def test_streams_of_a_policy_with_an_engine_of_its_own_end_when_it_is_deleted_and_its_engine_leaves(
    service: Service,
) -> None:
    with service.client() as client:
        policy = train(client, adapter="none").fine_tuned_model
        client.completions.create(model=policy, prompt="a", max_tokens=1)
    check_deletion(service, policy)
    wait_for(lambda: len(service.processes("ray::ServeReplica")) == 1, "its engine has left", seconds=300)


def check_deletion(service: Service, policy: str) -> None:
    """Deletes the policy while it and its base stream answers, and asserts that only the policy's answers end."""
    with clients(service, "tiny", policy, max_tokens=1500) as asking:
        wait_for(lambda: all(client.has_begun for client in asking), "all streams have begun")
        with service.client() as client:
            client.models.delete(policy)
        of_deleted = [client for client in asking if client.model == policy]
        wait_for(lambda: all(client.ends for client in of_deleted), "all streams of the deleted one have ended")
        assert {client.ends[0][1] for client in of_deleted} == {"error event"}
    assert {end for client in asking if client.model == "tiny" for _, end in client.ends} == {"answered"}

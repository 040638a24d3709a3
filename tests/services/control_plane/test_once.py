"""Retries act once: a proxy forwards each request and drops the first answers, as a bad network does."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psycopg
import pytest

from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, pairs


class DroppingProxy:
    """Forwards to the service; of the first `drops` connections it closes, the service has answered each."""

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self.drops = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            while data := server.recv(1 << 16):
                if self.drops:
                    self.drops -= 1
                    client.shutdown(socket.SHUT_RDWR)  # closing alone would wait for the thread that reads from it
                    return
                client.sendall(data)

    def close(self) -> None:
        self._listener.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        return


@pytest.fixture(scope="module")
def proxy(base_url: str) -> Iterator[DroppingProxy]:
    proxy = DroppingProxy(base_url)
    yield proxy
    proxy.close()


@pytest.fixture
def resending(proxy: DroppingProxy) -> Iterator[openai.OpenAI]:
    """The client with its own retries, on a connection that loses answers."""
    http = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))
    with openai.OpenAI(base_url=f"http://127.0.0.1:{proxy.port}/v1", api_key=API_KEY, http_client=http) as client:
        yield client


@pytest.fixture(scope="module")
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id


def job_ids(client: openai.OpenAI) -> list[str]:
    return [job.id for job in client.fine_tuning.jobs.list()]


@pytest.mark.slow
@pytest.mark.parametrize("drops", [1, 2])
def test_three_sends_of_which_answers_are_lost_make_one_job_and_one_file(
    client: openai.OpenAI, resending: openai.OpenAI, proxy: DroppingProxy, file_id: str, drops: int
) -> None:
    before = job_ids(client)
    proxy.drops = drops
    job = resending.fine_tuning.jobs.create(model="tiny", training_file=file_id, method={"type": "dpo"})
    assert job_ids(client) == [job.id, *before]

    files = [file.id for file in client.files.list()]
    proxy.drops = drops
    file = resending.files.create(file=(f"{drops}.jsonl", pairs(13)), purpose="fine-tune")
    assert [file.id for file in client.files.list()] == [file.id, *files]
    assert client.files.content(file.id).read() == pairs(13)

    proxy.drops = drops
    assert resending.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_the_same_body_sent_twice_on_purpose_is_two_jobs(client: openai.OpenAI, file_id: str) -> None:
    body: Any = {"model": "tiny", "training_file": file_id, "method": {"type": "dpo"}}
    assert client.fine_tuning.jobs.create(**body).id != client.fine_tuning.jobs.create(**body).id


def test_an_idempotency_key_answers_the_same_request_alike_and_refuses_another(base_url: str, file_id: str) -> None:
    body = {"model": "tiny", "training_file": file_id, "method": {"type": "dpo"}}

    def post(key: str, body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {API_KEY}", "Idempotency-Key": key}
        return httpx.post(f"{base_url}/v1/fine_tuning/jobs", json=body, headers=headers)

    refused = post("one", {**body, "model": "absent"})
    assert refused.status_code == 404  # nothing was made, so nothing is kept
    first, again = post("one", body), post("one", dict(reversed(body.items())))
    assert first.json() == again.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    other = post("one", {**body, "suffix": "other"})
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_in_use")
    assert post("two", body).json()["id"] != first.json()["id"]
    assert post("k" * 256, body).json()["error"]["param"] == "Idempotency-Key"


def test_an_idempotency_key_is_free_again_after_a_day(base_url: str, settings: Settings, file_id: str) -> None:
    body = {"model": "tiny", "training_file": file_id, "method": {"type": "dpo"}}
    headers = {"Authorization": f"Bearer {API_KEY}", "Idempotency-Key": "daily"}
    first = httpx.post(f"{base_url}/v1/fine_tuning/jobs", json=body, headers=headers)
    with psycopg.connect(settings.database_url) as rows:
        rows.execute("UPDATE answers SET created_at = now() - interval '25 hours' WHERE idempotency_key = 'daily'")
    later = [httpx.post(f"{base_url}/v1/fine_tuning/jobs", json=body, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in (first, *later)] == [200, 200, 200]
    assert later[0].json() == later[1].json() != first.json()


def test_sends_at_the_same_moment_make_one_job(client: openai.OpenAI, base_url: str, file_id: str) -> None:
    """As when the client gives up on an answer that is still being made."""
    body = {"model": "tiny", "training_file": file_id, "method": {"type": "dpo"}, "suffix": "at-once"}
    before = len(job_ids(client))
    answers: list[httpx.Response] = []

    def post(headers: dict[str, str]) -> None:
        headers["Authorization"] = f"Bearer {API_KEY}"
        answers.append(httpx.post(f"{base_url}/v1/fine_tuning/jobs", json=body, headers=headers))

    for sends in (
        [{"x-stainless-retry-count": str(count)} for count in (1, 2)],
        [{"Idempotency-Key": "at-once"} for _ in range(3)],
    ):
        threads = [threading.Thread(target=post, args=(headers,)) for headers in sends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert all(answer.headers["retry-after-ms"] == "250" for answer in answers if answer.status_code == 409)
    assert len(job_ids(client)) == before + 2
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 200}) == 2

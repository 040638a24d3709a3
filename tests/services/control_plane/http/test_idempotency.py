"""Tests that repeated requests act once. A proxy forwards each request and drops the first answers."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psycopg
import pytest

from services.control_plane.core.tables import DEFAULT_PROJECT
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, api_of, new_key, new_project, pairs


class DroppingProxy:
    """Forwards requests to the service. It closes the first `drops` connections after the service has answered."""

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
    """Returns OpenAI's client with its own retries, on a connection that loses answers."""
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
    """A client sends again while the service still works on the first request."""
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


def resent(api: httpx.Client, path: str, body: Any = None, *, count: int = 1) -> httpx.Response:
    """Posts a request as the client does after `count` requests that were lost."""
    return api.post(path, json=body, headers={"x-stainless-retry-count": str(count)})


def test_a_resend_of_a_change_acts_again_once_its_opposite_was_done(api: httpx.Client, file_id: str) -> None:
    body = {"model": "tiny", "training_file": file_id, "method": {"type": "dpo"}}
    job = f"/fine_tuning/jobs/{api.post('/fine_tuning/jobs', json=body).json()['id']}"
    for counts in ((0,), (1, 2), (1,)):  # of (1, 2) the first one's answer is lost
        for wish, status in (("pause", "paused"), ("resume", "queued")):
            answers = [resent(api, f"{job}/{wish}", count=count) for count in counts]
            assert [answer.json()["status"] for answer in answers] == [status for _ in counts]
            assert [answer.headers.get("x-raydpo-deduplicated") for answer in answers] == [None, "true"][: len(counts)]
            assert api.get(job).json()["status"] == status
    assert resent(api, f"{job}/cancel").json()["status"] == "cancelled"
    assert resent(api, f"{job}/cancel", count=2).json()["status"] == "cancelled"


def test_a_resent_limit_is_the_projects_whichever_admin_set_another_one_since(api: httpx.Client, base_url: str) -> None:
    project = f"/x/projects/{new_project(api, 'resent')}"
    other = new_key(api, scopes=["read", "write", "admin"])["value"]
    with api_of(base_url, other) as another:
        for asking, limit, count in ((api, 1, 0), (another, 9, 0), (api, 1, 1)):
            answer = resent(asking, project, {"max_running_jobs": limit}, count=count)
            assert answer.json()["max_running_jobs"] == api.get(project).json()["max_running_jobs"] == limit


def test_a_resent_rotation_rotates_once_and_a_resent_name_is_the_endpoints(api: httpx.Client) -> None:
    wanted = {"name": "n", "url": "https://example.com/hook", "event_types": ["fine_tuning.job.succeeded"]}
    endpoint = f"/webhook_endpoints/{api.post('/webhook_endpoints', json=wanted).json()['id']}"
    first, second = (resent(api, f"{endpoint}/rotate_secret", count=count) for count in (1, 2))
    assert first.json()["signing_secret"] == second.json()["signing_secret"]
    for name, count in (("m", 0), ("n", 0), ("m", 1)):
        assert (
            resent(api, endpoint, {"name": name}, count=count).json()["name"]
            == api.get(endpoint).json()["name"]
            == name
        )
    gone = [api.request("DELETE", endpoint, headers={"x-stainless-retry-count": str(count)}) for count in (0, 1)]
    assert [answer.status_code for answer in gone] == [200, 200]
    assert resent(api, endpoint, {"name": "m"}).status_code == 404, "a change of what was deleted since is not answered"


def test_a_resent_permission_is_granted_again_after_it_was_revoked(
    api: httpx.Client, settings: Settings, file_id: str
) -> None:
    body = {"model": "tiny", "training_file": file_id, "method": {"type": "dpo"}}
    job_id, friend = api.post("/fine_tuning/jobs", json=body).json()["id"], new_project(api, "friend")
    with psycopg.connect(settings.database_url) as rows:
        row = ("ft:tiny:raydpo::shared", DEFAULT_PROJECT, "/m", "tiny", job_id)
        rows.execute("INSERT INTO models (id, project_id, source, root, job_id) VALUES (%s, %s, %s, %s, %s)", row)
    path = "/fine_tuning/checkpoints/ft:tiny:raydpo::shared/permissions"
    granted = resent(api, path, {"project_ids": [friend]}, count=0).json()["data"][0]["id"]
    headers = {"x-stainless-retry-count": "0"}
    assert api.request("DELETE", f"{path}/{granted}", headers=headers).status_code == 200
    assert resent(api, path, {"project_ids": [friend]}).json()["data"][0]["id"] != granted
    again = api.request("DELETE", f"{path}/{granted}", headers=headers | {"x-stainless-retry-count": "1"})
    assert again.status_code == 200, "what is deleted stays so: its resend gets the first one's answer"
    assert len(api.get(path).json()["data"]) == 1

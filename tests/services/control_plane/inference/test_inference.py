"""Tests completions through the control plane, from a Ray Serve that dies, hangs and answers nonsense."""

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import httpx
import openai
import psycopg
import pytest
from sqlalchemy import select, text, update

from services import storage
from services.control_plane.core.errors import Unavailable
from services.control_plane.core.store import ProjectStore, Store, migrate
from services.control_plane.core.tables import DEFAULT_PROJECT, Deployment, Lease
from services.control_plane.inference import inference
from services.control_plane.inference.inference import Inference
from services.control_plane.inference.metering import Meter
from services.control_plane.models.deployments.recent import RecentModels
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import FakeRay, api_of, free_port, new_key, new_project, served

ASK_TINY = ("completions", "tiny", b"{}", Meter(lambda *used: None, shows_usage=True))
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


class Serve(threading.Thread):
    """A stand-in for Ray Serve's proxy, on real sockets.

    It sends `answer` to every connection and closes it, or, if `holds` is true, waits until the client leaves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.port = free_port()
        self.answer = b""
        self.holds = False
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.num_open = 0
        self.started = threading.Event()

    def reply(self, body: bytes, *, status: int = 200, kind: str = "application/json", more: str = "") -> None:
        head = f"HTTP/1.1 {status} X\r\nx-request-id: a\r\ncontent-type: {kind}\r\n"
        head += f"content-length: {len(body)}\r\n{more}\r\n"
        self.answer, self.holds = head.encode() + body, False

    def stream(self, body: bytes) -> None:
        """Sets the answer to the first chunk of a stream, after which more is expected."""
        head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        self.answer = head.encode() + b"%x\r\n%s\r\n" % (len(body), body)

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self._connect, "127.0.0.1", self.port):
            self.started.set()
            await self.stopping.wait()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head.decode().lower())
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        self.bodies.append(await reader.readexactly(length))
        writer.write(self.answer)
        if self.holds:
            await reader.read()
        writer.close()
        self.num_open -= 1


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    serve = Serve()
    serve.start()
    serve.started.wait()
    yield serve
    serve.loop.call_soon_threadsafe(serve.stopping.set)
    serve.join()


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay, serve: Serve) -> Settings:
    urls = {"ray_url": f"http://127.0.0.1:{fake_ray.server.server_port}", "serve_url": f"http://127.0.0.1:{serve.port}"}
    models = offline.models | {"slow": offline.models["tiny"]}
    return offline.model_copy(update=urls | {"model_wait_seconds": 3.0, "max_requests": 8, "models": models})


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(api: httpx.Client, **more: object) -> httpx.Response:
    return api.post("/chat/completions", json=ASK | more)


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


# --- adapters --------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(api: httpx.Client, settings: Settings) -> str:
    """Adds an adapter of the base model tiny to the database, and returns its name."""
    name, job_id = f"ft:tiny:raydpo:é:{secrets.token_hex(12)}", f"ftjob-{secrets.token_hex(4)}"
    columns = "id, project_id, spec, model_source, model_root, priority, desired, observed, version"
    columns += ", fine_tuned_model, finished_at"
    values = f"'{job_id}', 'proj_default', '{{}}', '/m', 'tiny', 0, 'run', 'succeeded', 1, '{name}', now()"
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute(f"INSERT INTO jobs ({columns}) VALUES ({values})")
        rows.execute(
            "INSERT INTO models (id, project_id, source, root, base_source, adapter, job_id) "
            "VALUES (%s, 'proj_default', %s, 'tiny', %s, '{\"r\": 8}', %s)",
            [name, storage.join(settings.storage_url, "runs", "é"), settings.models["tiny"].source, job_id],
        )
    return name


def test_the_base_models_engine_is_told_of_the_adapter_and_of_nothing_that_the_client_says(
    api: httpx.Client, serve: Serve, fake_ray: FakeRay, settings: Settings, adapter: str
) -> None:
    serve.reply(b'{"id": "one"}')
    theirs = {"x-raydpo-adapter": "theirs", "x-raydpo-adapter-source": "s3://theirs"}
    for model in (adapter, "tiny"):
        body = json.dumps(ASK | {"model": model})
        answer = api.post("/chat/completions", content=body, headers=theirs | {"content-type": "application/json"})
        assert (answer.status_code, serve.bodies[-1]) == (200, body.encode())
    named, base = serve.heads[-2:]
    assert f"x-raydpo-adapter: {quote(adapter).lower()}\r\n" in named
    assert f"x-raydpo-adapter-source: {quote(storage.join(settings.storage_url, 'runs', 'é')).lower()}\r\n" in named
    assert "theirs" not in named
    assert "x-raydpo" not in base.partition("\r\n")[2]
    assert [name.split("-")[2] for name in fake_ray.applications] == ["tiny"]


def test_the_use_of_an_adapter_is_noted_once_in_ten_minutes(
    api: httpx.Client, serve: Serve, settings: Settings, adapter: str
) -> None:
    serve.reply(b"{}")

    def noted() -> datetime:
        assert ask(api, model=adapter).status_code == 200
        with psycopg.connect(settings.database_url) as rows:
            (row,) = rows.execute("SELECT attached_at FROM models WHERE id = %s", [adapter]).fetchall()
        found: datetime = row[0]
        return found

    first = noted()
    assert first > datetime.now(UTC) - timedelta(minutes=1)
    assert noted() == first
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute("UPDATE models SET attached_at = now() - interval '11 minutes' WHERE id = %s", [adapter])
    until(lambda: noted() > first)


def test_a_deleted_adapter_is_told_to_the_engine_and_refused(
    api: httpx.Client, serve: Serve, fake_ray: FakeRay, adapter: str
) -> None:
    serve.reply(b"{}")
    assert ask(api, model=adapter).status_code == 200
    before = {name: app["deployed_app_config"]["args"] for name, app in fake_ray.serve.items()}
    api.delete(f"/models/{adapter}").raise_for_status()
    assert "does not exist" in refusal(ask(api, model=adapter), 404)

    def told() -> set[str]:
        (app,) = fake_ray.serve.values()
        return set(app["deployed_app_config"]["deployments"][0]["user_config"]["deleted_adapters"])

    until(lambda: adapter in told())
    assert {name: app["deployed_app_config"]["args"] for name, app in fake_ray.serve.items()} == before


def test_answers_of_a_deleted_model_end_though_its_engine_was_not_told_and_others_go_on(
    api: httpx.Client, serve: Serve, fake_ray: FakeRay, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve.reply(b"{}")
    assert ask(api, model=adapter).status_code == 200  # it is loaded
    monkeypatch.setattr(fake_ray, "deploy", lambda body: None)  # Ray Serve tells no replica
    serve.stream(DELTA)
    serve.holds = True
    with (
        ThreadPoolExecutor(1) as threads,
        api.stream("POST", "/chat/completions", json=ASK | {"model": adapter, "stream": True}) as gone,
        api.stream("POST", "/chat/completions", json=ASK | {"stream": True}),
    ):
        waiting = threads.submit(ask, api, model=adapter)
        until(lambda: serve.num_open == 3)
        api.delete(f"/models/{adapter}").raise_for_status()
        event = json.loads(gone.read().split(b"data: ")[-1])["error"]
        whole = waiting.result()
        assert refusal(whole, 404) == event["message"] == f"The model '{adapter}' was deleted."
        assert whole.json()["error"] == event
        assert event["code"] == "model_not_found"
        until(lambda: serve.num_open == 1)  # the base still answers
    until(lambda: serve.num_open == 0)


def test_an_adapter_that_was_deleted_on_the_way_does_not_exist(api: httpx.Client, serve: Serve, adapter: str) -> None:
    gone = {"message": "The model 'x' was deleted.", "type": "e", "param": "model", "code": "model_not_found"}
    serve.reply(json.dumps({"error": gone}).encode(), status=404)
    answer = ask(api, model=adapter)
    assert refusal(answer, 404) == gone["message"]
    assert answer.json()["error"]["code"] == "model_not_found"


def test_an_adapter_that_the_engine_cannot_attach_is_the_clients_to_change(
    api: httpx.Client, serve: Serve, adapter: str
) -> None:
    why = {"message": "The engine cannot attach it.", "type": "e", "param": "model", "code": "adapter_unusable"}
    serve.reply(json.dumps({"error": why}).encode(), status=409)
    answer = ask(api, model=adapter)
    assert refusal(answer, 400) == why["message"]
    assert answer.json()["error"] == why | {"type": "invalid_request_error"}


# --- what comes back -----------------------------------------------------------------------------------


def test_a_replica_that_dies_is_a_503_to_be_sent_again(api: httpx.Client, serve: Serve) -> None:
    for died, said in (
        (b"", "did not answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", "stopped while it"),
        (
            b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 21\r\n\r\nInternal Server Error",
            "stopped while it answered, because its replica died",
        ),
    ):
        serve.answer = died
        answer = ask(api)
        assert f"The model 'tiny' {said}" in refusal(answer, 503)
        assert answer.headers["retry-after"] == "15"
    serve.reply(b'{"error": {"message": "Dead.", "type": "engine_died"}}', status=503)
    assert "The model 'tiny' cannot answer now: Dead. Try again" in refusal(ask(api), 503)
    serve.reply(b"no gzip", more="content-encoding: gzip\r\n")
    assert "stopped while it answered" in refusal(ask(api), 503)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'["too busy"]', '["too busy"]'),
        (b'"too busy"', '"too busy"'),
        (b"null", "null"),
        (b'{"error": "too busy"}', "too busy"),
        (b'{"error": {"message": {"a": 1}}}', "{'a': 1}"),
        (b'{"message": "too busy"}', "too busy"),
        (b"<html>", "<html>"),
        (b"\xff", "\ufffd"),
        (b"", "no reason given"),
        (b"[" * 200_000, "[[["),
    ],
)
def test_an_error_is_told_whatever_it_looks_like(api: httpx.Client, serve: Serve, body: bytes, said: str) -> None:
    for status, ours in ((500, 500), (503, 503), (400, 400), (418, 500)):
        serve.reply(body, status=status)
        assert said in refusal(ask(api), ours)


def test_a_stream_that_is_cut_ends_with_an_error_the_client_raises(client: openai.OpenAI, serve: Serve) -> None:
    event = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    event |= {"choices": [{"index": 0, "delta": {"content": "he"}, "finish_reason": None}]}
    whole = f"data: {json.dumps(event)}".encode()
    for cut in (whole + b"\n\n" + whole[:40], whole + b"\n", whole + b"\r\n\r\nda", whole + b"\n\n"):
        serve.stream(cut)
        told = []
        chunks = client.chat.completions.create(stream=True, **ASK)  # type: ignore[call-overload]
        with pytest.raises(openai.APIError, match="stopped in the middle"):
            told.extend(chunk.choices[0].delta.content for chunk in chunks)
        assert told == ["he"]


def test_a_whole_stream_comes_as_it_was_sent(api: httpx.Client, serve: Serve) -> None:
    body = b"data: {}\n\ndata: [DONE]\n\nno newline at the end"
    serve.stream(body)
    serve.answer += b"0\r\n\r\n"
    assert ask(api, stream=True).content == body


# --- what is counted -----------------------------------------------------------------------------------

DELTA = b'data: {"choices":[{"index":0,"delta":{"content":"he"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"total_tokens":10,"completion_tokens":3}}\n\n'


def used(api: httpx.Client, settings: Settings, key_id: str) -> tuple[int, int, int]:
    """Returns the numbers of requests, prompt tokens and completion tokens of a key, when they are written."""
    rows = psycopg.connect(settings.database_url, autocommit=True)
    query = "SELECT num_requests, prompt_tokens, completion_tokens FROM usage WHERE key_id = %s"
    with rows:
        until(lambda: rows.execute(query, [key_id]).fetchone() is not None)
        found = rows.execute(query, [key_id]).fetchone()
    assert found is not None
    return (int(found[0]), int(found[1]), int(found[2]))


def test_plain_and_streamed_answers_are_counted_and_only_who_asked_sees_the_count(
    api: httpx.Client, base_url: str, serve: Serve, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.control_plane.tenants.usage.FLUSH_SECONDS", 0.05)
    key = new_key(api)
    with api_of(base_url, key["value"]) as own:
        serve.reply(b'{"usage": {"prompt_tokens": 5, "completion_tokens": 2}}')
        assert ask(own).status_code == 200
        serve.stream(DELTA + DELTA + USAGE + b"data: [DONE]\n\n")
        serve.answer += b"0\r\n\r\n"
        raw = b'{"model": "tiny", "stream": true, "n": 1.10}'
        answer = own.post("/chat/completions", content=raw, headers={"content-type": "application/json"})
        assert answer.content == DELTA + DELTA + b"data: [DONE]\n\n"
        assert serve.bodies[-1] == raw[:-1] + b',"stream_options":{"include_usage":true}}'
        asked = ask(own, stream=True, stream_options={"include_usage": True})
        assert asked.content == DELTA + DELTA + USAGE + b"data: [DONE]\n\n"
    until(lambda: used(api, settings, key["id"]) == (3, 5 + 7 + 7, 2 + 3 + 3))


def test_a_key_over_its_tokens_is_told_when_to_come_back(api: httpx.Client, base_url: str, serve: Serve) -> None:
    serve.reply(b'{"usage": {"prompt_tokens": 90, "completion_tokens": 60}}')
    with api_of(base_url, new_key(api, tokens_per_minute=100)["value"]) as own:
        first, second = ask(own), ask(own)
        assert (first.status_code, first.headers["x-ratelimit-remaining-tokens"]) == (200, "100")
        assert "100 tokens per minute" in refusal(second, 429)
        assert (second.headers["x-ratelimit-remaining-tokens"], second.headers["retry-after"]) == ("0", "30")
        assert own.get("/models").status_code == 200  # other routes take no tokens


# --- who leaves ----------------------------------------------------------------------------------------


def test_one_key_has_a_limited_number_of_requests_in_flight_and_others_are_answered(
    api: httpx.Client, base_url: str, settings: Settings, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve.reply(b"{}")
    assert ask(api).status_code == 200  # it is loaded
    monkeypatch.setitem(settings.__dict__, "requests_at_once", 2)  # the service in this process reads it
    serve.stream(DELTA)
    serve.holds = True

    def begin(client: httpx.Client) -> AbstractContextManager[httpx.Response]:
        return client.stream("POST", "/chat/completions", json=ASK | {"stream": True})

    with api_of(base_url, new_key(api)["value"]) as own:
        with begin(own) as first, begin(own) as second:
            left = [answer.headers["x-ratelimit-remaining-at-once"] for answer in (first, second)]
            assert left == ["1", "0"]
            third = ask(own)
            assert "2 requests of the key" in refusal(third, 429)
            assert third.json()["error"]["code"] == "rate_limit_exceeded"
            assert (third.headers["retry-after"], third.headers["x-ratelimit-limit-at-once"]) == ("1", "2")
            assert own.get("/files").status_code == 200
            with begin(api) as other:
                assert other.status_code == 200
        until(lambda: serve.num_open == 0)
        serve.reply(b"{}")
        until(lambda: ask(own).status_code == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_completion(
    api: httpx.Client, serve: Serve, settings: Settings, stream: bool
) -> None:
    serve.reply(b"{}")
    ask(api)  # it is loaded
    serve.answer = b""
    if stream:
        serve.stream(b"data: {}\n\n")
    serve.holds = True
    with pytest.raises(httpx.ReadTimeout):
        api.post("/chat/completions", json=ASK | {"stream": stream}, timeout=0.5)
    until(lambda: serve.num_open == 0)
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        marks = "SELECT count(*) FROM deployments WHERE answering <> '{}'"
        until(lambda: rows.execute(marks).fetchone() == (0,))


# --- places --------------------------------------------------------------------------------------------


def test_requests_that_wait_for_a_model_leave_places_to_other_projects_and_are_told_for_what(
    api: httpx.Client,
    base_url: str,
    serve: Serve,
    fake_ray: FakeRay,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(body: dict[str, list[dict[str, str]]]) -> None:
        new = [config for config in body["applications"] if config["name"] not in fake_ray.serve]
        fake_ray.serve |= {config["name"]: served(config, status="DEPLOYING") for config in new}

    monkeypatch.setattr(fake_ray, "deploy", load)
    key = new_key(api, project_id=new_project(api, "waits"), scopes=["inference", "read"])
    answers: list[httpx.Response] = []

    def wait() -> None:
        with api_of(base_url, key["value"]) as theirs:
            answers.append(theirs.post("/chat/completions", json=ASK | {"model": "slow"}))

    clients = [threading.Thread(target=wait) for _ in range(8)]
    for client in clients:
        client.start()
    until(lambda: len(answers) > 0)  # those beyond the project's half are refused at once
    assert api.get("/models").status_code == 200
    serve.reply(b"{}")
    for client in clients:
        client.join()
    said = [refusal(answer, 503) for answer in answers]
    waited = [message for message in said if "has been loading for" in message]
    assert 0 < len(waited) <= 5
    assert all(
        "a request waits for the model at most 3 seconds. Try again in 15 seconds" in message for message in waited
    )
    assert all(answer.headers["retry-after"] for answer in answers)


@asynccontextmanager
async def inference_of(settings: Settings) -> AsyncIterator[tuple[Inference, Store]]:
    migrate(settings.database_url)
    store = Store(settings.database_url)
    ray_api = RayApi(settings, store.instance)
    inference = Inference(store, ray_api, settings, RecentModels())
    try:
        yield inference, store
    finally:
        await ray_api.close()
        await store.close()


def test_a_request_without_a_connection_to_the_model_is_told_so(
    settings: Settings, api: httpx.Client, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.control_plane.inference.inference.POOL_SECONDS", 0.2)
    serve.reply(b"{}")
    assert ask(api).status_code == 200  # it is loaded
    serve.answer, serve.holds = b"", True

    async def two() -> None:
        async with inference_of(settings.model_copy(update={"max_requests": 1})) as (inference, store):
            caller = ProjectStore(store, DEFAULT_PROJECT)
            first = asyncio.create_task(inference.forward(caller, *ASK_TINY, streams=False))
            await asyncio.to_thread(until, lambda: serve.num_open > 0)
            with pytest.raises(
                Unavailable, match=("cannot be asked now, because models are already answering 1 requests")
            ):
                await inference.forward(caller, *ASK_TINY, streams=False)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    asyncio.run(asyncio.wait_for(two(), 300))


def test_a_model_is_marked_while_it_answers_and_what_nobody_uses_is_not_remembered(
    settings: Settings, api: httpx.Client, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STAY_SECONDS", "LEAVE_SECONDS", "ASK_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(f"services.control_plane.inference.inference.{name}", 0.01)
    serve.reply(b"{}")
    assert ask(api).status_code == 200  # it is loaded
    serve.answer, serve.holds = b"", True

    async def use() -> None:
        async with inference_of(settings) as (inference, store):

            async def marks() -> list[float]:
                async with store.begin() as session:
                    rows = await session.scalars(select(Deployment).where(Deployment.model_id == "tiny"))
                    return [
                        until for row in rows for name, until in row.answering.items() if name == inference._replica
                    ]

            caller = ProjectStore(store, DEFAULT_PROJECT)
            answering = asyncio.create_task(inference.forward(caller, *ASK_TINY, streams=False))
            await asyncio.to_thread(until, lambda: serve.num_open > 0)
            (first,) = await marks()
            await asyncio.sleep(0.02)
            await inference.mark()
            (second,) = await marks()
            assert second > first
            async with store.begin() as session:  # and the reconciler, which would put that right, stands by
                await session.execute(update(Lease).values(holder="another", expires_at=text("now() + interval '1 h'")))
            await asyncio.sleep(0.5)
            async with store.begin() as session:
                await session.execute(update(Deployment).values(waits_for="its next turn, because another model waits"))
            await inference.mark()
            short = settings.model_copy(update={"model_wait_seconds": 0.05})
            monkeypatch.setattr(inference, "_settings", short)
            with pytest.raises(
                Unavailable, match=("waits for its next turn, because another model waits; a request waits for")
            ):
                await inference.forward(caller, *ASK_TINY, streams=False)
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            await asyncio.sleep(0.02)
            await inference.mark()
            assert await marks() == []
            assert inference._uses == {}
            async with store.begin() as session:
                await session.execute(update(Lease).values(expires_at=text("now()")))

    asyncio.run(asyncio.wait_for(use(), 300))


def test_requests_in_flight_share_the_time_of_their_model() -> None:
    use = inference._Use()
    use.change(1, 100.0)  # the first is alone for 3 seconds, both are there for 4, the second is alone for 5
    first = use.share
    use.change(1, 103.0)
    second = use.share
    use.change(-1, 107.0)
    assert use.share - first == 3 + 4 / 2
    use.change(-1, 112.0)
    assert use.share - second == 4 / 2 + 5
    use.change(1, 119.0)  # nobody asked for 7 seconds
    assert use.share - second == 4 / 2 + 5

"""Tests judges at addresses with an HTTP server that answers as OpenAI's chat does: it wants its key, refuses fields
that it does not know, and answers freely."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from services.control_plane.core.errors import ApiError, InvalidRequest, Unavailable
from services.control_plane.evaluations.kinds.addresses import MOST_CONNECTIONS, MOST_RETRIES, Address, ask, client
from services.control_plane.settings import JudgeAddress, Settings
from tests.services.control_plane.evaluations.conftest import POLICY, Engines, chats, created, ended, results, until

KEY = "sk-0123456789"
OUTSIDE = {"type": "model", "model": "outside"}
KNOWN = {"model", "messages", "temperature", "max_completion_tokens", "response_format", "seed"}


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that wait for their thread; with the usual 5, the others come seconds later


class OpenAi:
    """The API of another company. Prefers the answer with the word `good`, or grades an answer, in a sentence."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.key, self.retry_after = KEY, "0"
        self.failures: list[tuple[int, str]] = []  # the statuses and messages of the next answers
        self.is_open = threading.Event()  # while it is not set, answers without an error wait
        outside = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, answer = outside.answer(self.path, self.headers["authorization"], body)
                if status == 200:
                    outside.is_open.wait()
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.send_header("retry-after", outside.retry_after)
                with contextlib.suppress(OSError):  # the client has left
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                return

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}).start()

    def answer(self, path: str, authorization: str | None, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if authorization != f"Bearer {self.key}":
            return 401, {"error": {"message": f"Incorrect API key provided: {authorization}."}}
        if path != "/v1/chat/completions" or body["model"] != "gpt-9":
            return 404, {"error": {"message": "There is nothing."}}
        if unknown := body.keys() - KNOWN:
            return 400, {"error": {"message": f"Unrecognized request arguments supplied: {', '.join(unknown)}"}}
        if self.failures:
            status, message = self.failures.pop(0)
            return status, {"error": {"message": message, "type": "error", "param": None, "code": None}}
        self.bodies.append(body)
        text = f"**{self.verdict(body['messages'][-1]['content'])}** is my answer."
        message = {"role": "assistant", "content": text, "refusal": None}
        usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}
        return 200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}

    def verdict(self, question: str) -> str:
        if "<answer>" in question:
            return "8/10" if "good" in question.partition("<answer>")[2] else "3/10"
        is_good = ["good" in question.partition(f"<answer_{side}>")[2].partition("</answer_")[0] for side in "ab"]
        return "C" if is_good[0] == is_good[1] else "A" if is_good[0] else "B"


@pytest.fixture(scope="module")
def outside() -> Iterator[OpenAi]:
    outside = OpenAi()
    yield outside
    outside.server.shutdown()
    outside.server.server_close()


@pytest.fixture(scope="module")
def settings(settings: Settings, outside: OpenAi) -> Settings:
    return settings.model_copy(update={"judges": {"outside": place(outside)}})


@pytest.fixture(autouse=True)
def fresh(outside: OpenAi) -> None:
    outside.bodies.clear()
    outside.failures.clear()
    outside.is_open.set()
    outside.key, outside.retry_after = KEY, "0"


def place(outside: OpenAi, **more: Any) -> JudgeAddress:
    return JudgeAddress.model_validate({"url": outside.url, "model": "gpt-9", "api_key": KEY, **more})


def comparison(**more: Any) -> dict[str, Any]:
    return {"kind": "compare", "model": POLICY, "judge": OUTSIDE, "rows": chats(6), **more}


@pytest.mark.usefixtures("policy")
def test_a_judge_at_an_address_compares_and_no_engine_is_loaded_for_it(
    api: httpx.Client, engines: Engines, outside: OpenAi
) -> None:
    found = results(api, **comparison(judge={**OUTSIDE, "criteria": "Prefer {brevity}."}))
    assert (found["num_wins"], found["order_disagreement"]) == (6, 0)
    assert set(engines.counts()) == {POLICY, "tiny"}
    assert len(outside.bodies) == 12
    assert {(body["model"], body["temperature"]) for body in outside.bodies} == {("gpt-9", 0)}
    assert all("Prefer {brevity}." in body["messages"][0]["content"] for body in outside.bodies)


@pytest.mark.usefixtures("policy")
def test_a_judge_at_an_address_grades_each_answer(api: httpx.Client, outside: OpenAi) -> None:
    found = results(api, kind="score", model=POLICY, judge=OUTSIDE, rows=chats(3))
    assert found["score"] == {"value": 8, "low": 8, "high": 8}
    assert results(api, kind="score", model="tiny", judge=OUTSIDE, rows=chats(3))["score"]["value"] == 3


@pytest.mark.usefixtures("policy")
def test_the_answers_of_a_judge_at_an_address_are_counted_as_tokens(api: httpx.Client, outside: OpenAi) -> None:
    results(api, **comparison(rows=chats(2)))

    def used() -> dict[str, Any] | None:
        rows = api.get("/x/usage", params={"group_by": "model"}).json()["data"]
        return next((row for row in rows if row["id"] == "outside"), None)

    row = until(used)
    assert row["prompt_tokens"] == 100 * row["num_requests"] > 0
    assert row["accelerator_seconds"] == 0


@pytest.mark.usefixtures("policy")
def test_an_evaluation_waits_until_its_judge_takes_the_key_which_it_never_tells(
    api: httpx.Client, outside: OpenAi
) -> None:
    outside.key = "another"
    made = created(api, **comparison(rows=chats(3)))
    waiting = until(lambda: api.get(f"/x/evaluations/{made['id']}").json()["waits_for"])
    assert "The judge 'outside' refuses the API key of the service (status 401); ask the operator" in waiting
    outside.key = KEY
    found = ended(api, made["id"])
    assert (found["status"], found["num_failed"], found["results"]["num_wins"]) == ("succeeded", 0, 3)
    items = api.get(f"/x/evaluations/{made['id']}/content").text
    assert KEY not in waiting + json.dumps(found) + items


@pytest.mark.usefixtures("policy")
def test_a_judge_that_is_busy_or_fails_is_asked_again_and_a_refused_question_fails_its_item(
    api: httpx.Client, outside: OpenAi
) -> None:
    outside.failures[:] = [(429, "Slow down."), (503, "Overloaded."), (500, "Oh."), (502, "Oh.")]
    assert results(api, **comparison(rows=chats(2)))["num_wins"] == 2
    outside.failures[:] = [(400, f"This is too long for {KEY}.")]
    found = ended(api, created(api, **comparison(rows=chats(1)))["id"])
    assert (found["status"], found["num_failed"]) == ("failed", 1)
    assert "The judge 'outside' refused the question: This is too long for ***." in found["error"]["message"]


@pytest.mark.usefixtures("policy")
def test_a_judge_at_an_address_is_no_model(api: httpx.Client) -> None:
    answer = api.post("/x/evaluations", json=comparison(model="outside"))
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
    answer = api.post("/x/evaluations", json=comparison(judge={"type": "model", "model": "nobody"}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "judge.model")
    assert answer.json()["error"]["message"].endswith("Judges at addresses: outside.")


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        (400, InvalidRequest, "refused the question: Bad ***."),
        (413, InvalidRequest, "refused the question"),
        (422, InvalidRequest, "refused the question"),
        (401, Unavailable, "refuses the API key of the service (status 401); ask the operator"),
        (403, Unavailable, "refuses the API key of the service (status 403); ask the operator"),
        (404, Unavailable, "its address answers with the status 404"),
        (301, Unavailable, "its address answers with the status 301"),
        (429, Unavailable, "its address answers with the status 429"),
        (503, Unavailable, "its address answers with the status 503"),
        (500, ApiError, "failed with the status 500: Bad ***."),
        (504, ApiError, "failed with the status 504"),
    ],
)
def test_each_failure_is_told_without_the_key(
    outside: OpenAi, caplog: pytest.LogCaptureFixture, status: int, kind: type[ApiError], told: str
) -> None:
    outside.failures[:] = [(status, f"Bad {KEY}.")] * (1 + MOST_RETRIES)
    error = asyncio.run(failure(Address("j", place(outside))))
    assert len(outside.failures) == (0 if status == 429 else MOST_RETRIES)
    assert type(error) is kind
    assert told in error.message
    assert KEY not in error.message + caplog.text


def test_a_429_is_sent_again_unless_the_address_wants_a_long_wait(outside: OpenAi) -> None:
    async def asked() -> bytes:
        async with client() as http:
            return await ask(http, Address("j", place(outside)), "?")

    outside.failures[:] = [(429, "Slow down.")] * MOST_RETRIES
    assert json.loads(asyncio.run(asked()))["usage"]["total_tokens"] == 105
    outside.failures[:], outside.retry_after = [(429, "Slow down.")] * 2, "3600"
    assert "the status 429" in asyncio.run(failure(Address("j", place(outside)))).message
    assert len(outside.failures) == 1


@pytest.mark.usefixtures("policy")
def test_when_one_request_of_an_item_fails_the_others_are_not_sent(api: httpx.Client, outside: OpenAi) -> None:
    outside.failures[:] = [(400, "I do not take this.")]
    outside.is_open.clear()
    body = {"kind": "samples", "model": POLICY, "judge": OUTSIDE, "num_samples": 8, "rows": chats(1)}
    try:
        assert ended(api, created(api, **body)["id"])["num_failed"] == 1
    finally:
        outside.is_open.set()
    results(api, kind="score", model=POLICY, judge=OUTSIDE, rows=chats(1))  # behind all that wait for a connection
    assert len(outside.bodies) <= MOST_CONNECTIONS + 1 < 8 * 7 - 1


def test_an_address_where_nobody_listens_or_that_wants_a_key_cannot_be_asked(outside: OpenAi) -> None:
    nowhere = asyncio.run(failure(Address("j", place(outside, url="http://127.0.0.1:9/v1"))))
    assert isinstance(nowhere, Unavailable)
    assert "The judge 'j' did not answer (ConnectError)" in nowhere.message
    keyless = asyncio.run(failure(Address("j", place(outside, api_key=None))))
    assert "refuses the API key" in keyless.message


async def failure(judge: Address) -> ApiError:
    async with client() as http:
        with pytest.raises(ApiError) as failed:
            await ask(http, judge, "?")
    return failed.value


def test_the_key_is_not_shown_with_the_judge(outside: OpenAi) -> None:
    judge = Address("j", place(outside))
    assert judge.place.api_key == SecretStr(KEY)
    assert KEY not in repr(judge)

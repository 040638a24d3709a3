"""A served policy, as the unmodified openai client sees it."""

import httpx
import pytest
from openai import OpenAI

from tests.services.serving.conftest import MODEL_LENGTH, POLICY, Serving

pytestmark = pytest.mark.ray

MODEL = POLICY["model_id"]
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]


def test_chat_answers_under_the_policys_id(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=6)
    assert answer.model == MODEL
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage
    assert answer.usage.completion_tokens <= 6


def test_chat_streams_under_the_policys_id(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {MODEL}
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_completions_answer_whole_and_streamed(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="the lazy", max_tokens=12, temperature=0)
    chunks = list(client.completions.create(model=MODEL, prompt="the lazy", max_tokens=12, temperature=0, stream=True))
    assert {whole.model, *(chunk.model for chunk in chunks)} == {MODEL}
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "ft:tiny"}, 404, "model"),
        ({"messages": [{"role": "user", "content": "fox" * MODEL_LENGTH}]}, 400, "input_tokens"),
        ({"messages": [{"role": "user", "content": "fox" * MODEL_LENGTH}], "stream": True}, 400, "input_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": MODEL_LENGTH + 1}, 400, "max_tokens"),
    ],
)
def test_bad_requests_are_refused_by_name(serving: Serving, change: dict[str, object], status: int, param: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES} | change
    answer = httpx.post(f"{serving.route('policy-1')}/v1/chat/completions", json=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert error["message"]


@pytest.mark.parametrize("path", ["/metrics", "/version", "/tokenize", "/openapi.json", "/scale_elastic_ep"])
def test_the_engines_own_routes_are_closed(serving: Serving, path: str) -> None:
    for method in ("GET", "POST"):
        assert httpx.request(method, serving.route("policy-1") + path, timeout=60).status_code == 404

"""Tests a served policy through OpenAI's unmodified client and as the control plane calls it."""

from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from dpo_core.data.groups import Group
from dpo_core.encoding.encode import encode_group
from dpo_core.models.model import load_policy, load_tokenizer
from dpo_core.policy.scorer import score_reference
from services.contract import SCORE_TEXTS, SCORE_TOKENS, Scored
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


def test_the_control_plane_has_texts_and_ids_scored_as_the_trainer_scores_them(
    serving: Serving, model_folder: Path
) -> None:
    answer = {"role": "assistant", "content": "jumps over"}
    turns = [answer, {"role": "user", "content": "the dog?"}, {"role": "assistant", "content": "the lazy dog"}]
    groups = [Group("the quick", (" fox", " dog", ""), 1), Group(MESSAGES, ([answer], turns), 2)]  # type: ignore[list-item, arg-type]
    rows = [{"prompt": group.prompt, "completions": group.completions} for group in groups]
    route = f"{serving.route('policy-1')}/v1"
    texts = httpx.post(f"{route}/{SCORE_TEXTS}", json={"groups": rows}, timeout=60).raise_for_status()
    found = Scored.model_validate_json(texts.content)
    encoded = [encode_group(group, load_tokenizer(model_folder)) for group in groups]
    assert found.num_tokens == [group.num_learned for group in encoded]
    wanted = score_reference(load_policy(model_folder), encoded, max_tokens_per_pack=4096)
    for outputs, group in zip(found.outputs, wanted, strict=True):
        assert [logp for (logp,) in outputs] == pytest.approx(group.ref_logps, abs=1e-4, rel=0)
    ids = found.model_dump(mode="json")
    tokens = httpx.post(f"{route}/{SCORE_TOKENS}", json=ids, timeout=60).raise_for_status()
    assert [logp for row in Scored.model_validate_json(tokens.content).outputs for (logp,) in row] == pytest.approx(
        [logp for row in found.outputs for (logp,) in row], abs=1e-4, rel=0
    )
    long = {"groups": [{"prompt": "x", "completions": ["y" * MODEL_LENGTH]}]}
    refusal = httpx.post(f"{route}/{SCORE_TEXTS}", json=long, timeout=60)
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "rows.0.completions.0")

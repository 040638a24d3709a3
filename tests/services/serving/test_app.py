"""Tests applications of Ray Serve: how they are built, report errors, and are removed with all their processes."""

import asyncio
import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from openai import OpenAI
from peft import AutoPeftModelForCausalLM
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dpo_core.models.folder import save_model
from dpo_core.models.model import agree_on_padding, load_reward_model, load_tokenizer
from services.contract import LOAD_ROUTE, SCORE_TEXTS, Deployment, Scored
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from tests.services.serving.conftest import PLAIN, POLICY, Serving

DEPLOYMENT = {**POLICY, "source": "base/model", "dtype": "float32"}


@pytest.fixture(scope="module")
def build() -> Callable[[dict[str, object]], object]:
    with warnings.catch_warnings(action="ignore"):  # Ray Serve's own
        from services.serving.app import build
    return build


def test_a_field_of_another_release_is_ignored_and_a_wrong_value_refused(
    build: Callable[[dict[str, object]], object],
) -> None:
    build(DEPLOYMENT | {"max_tokens": 5})
    with pytest.raises(ValidationError, match="dtype"):
        build(DEPLOYMENT | {"dtype": "int3"})


def test_one_and_a_half_gpus_are_refused(build: Callable[[dict[str, object]], object]) -> None:
    with pytest.raises(ValueError, match=r"num_gpus is 1\.5"):
        build(DEPLOYMENT | {"num_gpus": 1.5})


def broken_copy(model_folder: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return folder


@pytest.mark.ray
def test_a_damaged_model_fails_with_the_files_name(serving: Serving, model_folder: Path, tmp_path: Path) -> None:
    source = broken_copy(model_folder, tmp_path / "broken").as_uri()
    serving.deploy({"app_name": "broken", "model_id": "broken", "source": source, "dtype": "float32"})
    apps = serving.wait(lambda apps: apps["broken"]["status"] == "DEPLOY_FAILED")
    serving.remove("broken")
    assert "model.safetensors of the model in file://" in apps["broken"]["deployments"]["policy"]["message"]
    assert apps["policy-1"]["status"] == "RUNNING"
    serving.wait(lambda apps: "broken" not in apps)


def load_of(serving: Serving, app_name: str) -> dict[str, Any]:
    answer = httpx.get(f"{serving.route(app_name)}{LOAD_ROUTE}", timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def replicas_of(app: dict[str, Any]) -> set[str]:
    return {replica["replica_id"] for replica in app["deployments"]["policy"]["replicas"]}


def keep_asking(url: str, replaced: threading.Event) -> None:
    """Sends one request after another until `replaced` is set. All of them must be answered in full."""
    body = {"model": "changed", "prompt": "fox", "max_tokens": 100, "ignore_eos": True, "n": 64}
    while not replaced.is_set():
        answer = httpx.post(url, json=body, timeout=1500)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 64 * 100


@pytest.mark.ray
def test_new_settings_replace_the_replicas_and_cut_no_answer(serving: Serving, model_folder: Path) -> None:
    given = {"app_name": "changed", "model_id": "changed", "source": str(model_folder), "dtype": "float32"}
    serving.deploy(given)
    old = replicas_of(serving.wait(lambda apps: apps["changed"]["status"] == "RUNNING")["changed"])
    url, long = f"{serving.route('changed')}/v1/completions", {"model": "changed", "prompt": "fox", "max_tokens": 200}
    replaced = threading.Event()

    def is_replaced(app: dict[str, Any]) -> bool:
        return app["status"] == "RUNNING" and len(replicas_of(app) - old) == len(replicas_of(app)) == 2

    with ThreadPoolExecutor(12) as pool:
        asking = [pool.submit(keep_asking, url, replaced) for _ in range(12)]
        try:
            while not load_of(serving, "changed")["requests_running"]:
                assert not any(each.done() for each in asking)
            engine = {"replicas": 2, "tool_call_parser": "hermes", "prefix_caching": False}
            serving.deploy(given | {"max_model_len": 128, "engine": engine})
            serving.wait(lambda apps: is_replaced(apps["changed"]))
        finally:
            replaced.set()
        for each in asking:
            each.result()
    refused = httpx.post(url, json=long, timeout=60)
    assert refused.status_code == 400
    assert "128" in refused.text
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
    asked = {"model": "changed", "messages": [{"role": "user", "content": "fox"}], "tools": tools, "max_tokens": 4}
    assert httpx.post(f"{serving.route('changed')}/v1/chat/completions", json=asked, timeout=60).status_code == 200
    asked_of_another = asked | {"model": POLICY["model_id"]}  # which has no parser of tool calls
    assert httpx.post(f"{serving.route('policy-1')}/v1/chat/completions", json=asked_of_another).status_code == 400
    serving.remove("changed")
    serving.wait(lambda apps: "changed" not in apps)


@pytest.mark.long
@pytest.mark.ray
def test_a_replica_is_added_while_one_has_more_requests_than_its_target(serving: Serving, model_folder: Path) -> None:
    engine = {"replicas": {"min": 1, "max": 2, "target_ongoing_requests": 1}}
    given = {"app_name": "grows", "model_id": "grows", "source": str(model_folder), "dtype": "float32"}
    serving.deploy(given | {"engine": engine})
    apps = serving.wait(lambda apps: apps["grows"]["status"] == "RUNNING")
    assert len(apps["grows"]["deployments"]["policy"]["replicas"]) == 1
    url, has_grown = f"{serving.route('grows')}/v1/completions", threading.Event()
    body = {"model": "grows", "prompt": "fox", "max_tokens": 200, "ignore_eos": True}

    def ask_on() -> None:
        while not has_grown.is_set():
            httpx.post(url, json=body, timeout=600).raise_for_status()

    def has_two(apps: dict[str, Any]) -> bool:
        replicas = apps["grows"]["deployments"]["policy"]["replicas"]
        return [replica["state"] for replica in replicas] == ["RUNNING"] * 2

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask_on) for _ in range(8)]
        try:
            serving.wait(has_two)
        finally:
            has_grown.set()
        for client in asking:
            client.result()
    serving.remove("grows")
    serving.wait(lambda apps: "grows" not in apps)


@pytest.mark.ray
def test_an_engine_tells_its_load(serving: Serving, client: OpenAI) -> None:
    client.completions.create(model=POLICY["model_id"], prompt="fox", max_tokens=7, extra_body={"ignore_eos": True})
    load = load_of(serving, "policy-1")
    assert load["tokens"] >= 7
    assert load["first_tokens"] >= 1
    assert 0 < load["first_token_seconds"] < 60 * load["first_tokens"]
    assert (load["requests_running"], load["requests_waiting"]) == (0, 0)


@pytest.mark.ray
def test_an_engine_stops_when_the_client_of_a_stream_leaves(serving: Serving) -> None:
    """By this a control plane ends the answers of deleted models."""
    before = load_of(serving, "policy-1")["tokens"]
    url, long = f"{serving.route('policy-1')}/v1/completions", {"max_tokens": 200, "ignore_eos": True, "n": 1000}
    body = {"model": POLICY["model_id"], "prompt": "fox", "stream": True, **long}
    with httpx.stream("POST", url, json=body, timeout=600) as answer:
        next(answer.iter_raw())
    deadline = time.monotonic() + 300
    while (load := load_of(serving, "policy-1"))["requests_running"] or load["requests_waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert load["tokens"] - before < 1000 * 200 / 2


@pytest.mark.ray
def test_chat_without_a_chat_template_is_refused(serving: Serving) -> None:
    with (
        OpenAI(base_url=f"{serving.route('plain')}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="chat template"),
    ):
        client.chat.completions.create(model=PLAIN["model_id"], messages=[{"role": "user", "content": "fox"}])


@pytest.mark.ray
def test_an_adapter_says_what_it_says_on_its_base(serving: Serving, adapter_folder: Path) -> None:
    """Its log-probabilities are those of PEFT's forward pass, and differ from those of its base model."""
    ids = [5, 9, 200, 31, 77]
    body = {"model": PLAIN["model_id"], "prompt": ids, "max_tokens": 1, "logprobs": 1, "temperature": 0}
    answer = httpx.post(f"{serving.route('plain')}/v1/completions", json=body, timeout=60).raise_for_status().json()
    (likeliest,) = answer["choices"][0]["logprobs"]["token_logprobs"]
    expected = AutoPeftModelForCausalLM.from_pretrained(adapter_folder)(input_ids=torch.tensor([ids]))
    assert likeliest == pytest.approx(expected.logits[0, -1].log_softmax(-1).max().item(), abs=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(adapter_folder.with_name("plain"))(input_ids=torch.tensor([ids]))
    assert plain.logits[0, -1].log_softmax(-1).max().item() != pytest.approx(likeliest, abs=1e-2)


@pytest.mark.ray
def test_a_reward_model_gives_the_outputs_of_transformers_and_answers_no_chat(
    serving: Serving, model_folder: Path, tmp_path: Path
) -> None:
    model = load_reward_model(model_folder, num_outputs=2)
    save_model(model, tmp_path, agree_on_padding(model, load_tokenizer(model_folder)), {})
    deployment = {"app_name": "rewards", "model_id": "rewards", "source": str(tmp_path), "dtype": "float32"}
    serving.deploy(deployment | {"num_outputs": 2})
    serving.wait(lambda apps: apps["rewards"]["status"] == "RUNNING")
    rows = {"groups": [{"prompt": "the quick brown", "completions": [" fox", " lazy dog"]}]}
    answer = httpx.post(f"{serving.route('rewards')}/v1/{SCORE_TEXTS}", json=rows, timeout=60).raise_for_status()
    found = Scored.model_validate_json(answer.content)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    (group,), (outputs,) = found.groups, found.outputs
    for ids, row in zip(group.completion_ids, outputs, strict=True):
        wanted = plain(torch.tensor([group.prompt_ids + ids])).logits[0].tolist()
        assert row == pytest.approx(wanted, abs=1e-4, rel=0)
    chat = {"model": "rewards", "messages": [{"role": "user", "content": "fox"}]}
    assert httpx.post(f"{serving.route('rewards')}/v1/chat/completions", json=chat, timeout=60).status_code == 404
    serving.remove("rewards")
    serving.wait(lambda apps: "rewards" not in apps)


@pytest.mark.ray
def test_a_control_plane_leaves_the_applications_of_others_running(serving: Serving, tmp_path: Path) -> None:
    def replicas() -> dict[str, int]:
        apps = {name: app for name, app in serving.status().items() if not name.startswith("raydpo-")}
        return {name: app["deployments"]["policy"]["replicas"][0]["pid"] for name, app in apps.items()}

    async def serve(*models: str) -> None:
        settings = Settings(
            home=tmp_path,
            DATABASE_URL="postgresql://nowhere",
            storage_url=tmp_path.as_uri(),
            api_key="key",
            advertised_url="http://127.0.0.1:9",
            ray_url=serving.head.url,
            ray_token=serving.token,
        )
        ray_api = RayApi(settings, instance)
        await ray_api.serve(
            [Deployment(app_name=name, model_id=name, source="/nowhere", dtype="float32") for name in models]
        )
        await ray_api.close()

    async def instance() -> str:
        return "0123abcd"

    others = replicas()
    asyncio.run(serve("mine"))
    serving.wait(lambda apps: apps["raydpo-0123abcd-mine"]["status"] == "DEPLOY_FAILED")
    assert replicas() == others
    asyncio.run(serve())
    serving.wait(lambda apps: "raydpo-0123abcd-mine" not in apps)
    assert replicas() == others


@pytest.mark.ray
def test_a_removed_application_takes_its_processes_along(serving: Serving, client: OpenAI) -> None:
    (replica,) = serving.status()["plain"]["deployments"]["policy"]["replicas"]
    process = psutil.Process(replica["pid"])
    processes = [process, *process.children(recursive=True)]
    assert len(processes) >= 2, "the replica and its engine"
    serving.remove("plain")
    serving.wait(lambda apps: "plain" not in apps)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    assert client.models.list().data[0].id == POLICY["model_id"]

"""Starts one Ray cluster with two applications for all tests of this folder.

One serves a policy, the other an adapter without a chat template.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_core.config import Lora
from dpo_core.models.model import load_policy, load_tokenizer
from services.contract import Score, Spans
from services.local.ray_head import RayHead, start_ray, stop_ray

POLICY = {"app_name": "policy-1", "model_id": "ft:tiny:raydpo::ab12cd34"}
LORA = {"max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 4}  # of an engine
PLAIN = {"app_name": "plain", "model_id": "plain"}
MODEL_LENGTH = 256
VOCABULARY = 384
SIZES: dict[str, Any] = {  # of the models
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": MODEL_LENGTH,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

torch.set_num_threads(1)


@dataclass
class Serving:
    """Calls Ray Serve as the control plane does: deploys applications, removes them, and sends requests."""

    head: RayHead
    token: str
    applications: dict[str, dict[str, Any]]
    deleted_adapters: list[str] = field(default_factory=list)

    def deploy(self, deployment: dict[str, Any]) -> None:
        self.applications[deployment["app_name"]] = deployment
        self._put()

    def delete_adapter(self, adapter_id: str) -> None:
        self.deleted_adapters.append(adapter_id)
        self._put()

    def remove(self, app_name: str) -> None:
        del self.applications[app_name]
        self._put()

    def status(self) -> dict[str, Any]:
        answer = httpx.get(self._url, headers=self._headers, timeout=60)
        return answer.raise_for_status().json()["applications"]

    def wait(self, until: Callable[[dict[str, Any]], bool], seconds: float = 1500) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not until(status := self.status()):
            assert time.monotonic() < deadline, status
            time.sleep(0.2)
        return status

    def route(self, app_name: str) -> str:
        return f"http://127.0.0.1:{self.head.serve_port}/{app_name}"

    def _put(self) -> None:
        body = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.head.serve_port},
            "applications": [
                {
                    "name": name,
                    "route_prefix": f"/{name}",
                    "import_path": "services.serving.app:build",
                    "args": args,
                    "deployments": [
                        {
                            "name": "policy",
                            "user_config": {"deleted_adapters": self.deleted_adapters},
                        }
                    ],
                }
                for name, args in self.applications.items()
            ],
        }
        httpx.put(self._url, json=body, headers=self._headers, timeout=60).raise_for_status()

    @property
    def _url(self) -> str:
        return f"{self.head.url}/api/serve/applications/"

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


def make_adapter(base: Path, folder: Path, *, seed: int = 0, adapter: Lora = Lora(r=4)) -> Path:  # noqa: B008 - frozen
    """Writes a random adapter, which changes the outputs of its base model, to the folder, and returns the folder."""
    torch.manual_seed(seed)
    policy = load_policy(base, adapter=adapter)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    policy.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


def make_model(folder: Path, chat_template: str | None) -> Path:
    """Writes a random two-layer Llama to the folder. Its weights are large, so that a wrong mask or position shows."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "policy", CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return make_adapter(make_model(folder / "plain", None), folder / "adapter")


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, adapter_folder: Path) -> Iterator[Serving]:
    home = tmp_path_factory.mktemp("serving")
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # or Ray would kill replicas for what others' tests take
            head = start_ray(home, token, say=print)
        serving = Serving(head, token.read_text(), {})
        serving.deploy(POLICY | {"engine": LORA, "source": model_folder.as_uri(), "dtype": "float32"})
        serving.deploy(PLAIN | {"source": str(adapter_folder), "dtype": "float32"})
        serving.wait(lambda apps: all(app["status"] == "RUNNING" for app in apps.values()))
        yield serving
    finally:
        stop_ray(home)


@pytest.fixture(scope="session")
def client(serving: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{serving.route(POLICY['app_name'])}/v1", api_key="none", max_retries=0) as client:
        yield client


class Driver:
    """Runs driver.py on the cluster, a program that scores through the application's handle, and sends rows to it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def score(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        others: Sequence[Spans] = (),
        **adapter: dict[str, str],
    ) -> list[Score]:
        found = self._ask(prompt_ids=prompt_ids, completion_ids=completion_ids, others=others, **adapter)
        return [Score(*score) for score in found]

    def cancel(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], *, after_seconds: float) -> None:
        self._ask(prompt_ids=prompt_ids, completion_ids=completion_ids, cancel_after=after_seconds)

    def _ask(self, **request: object) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["scores"]


@pytest.fixture(scope="session")
def driver(serving: Serving) -> Iterator[Driver]:
    environment = os.environ | {
        "RAY_ADDRESS": next(Path(serving.head.folder).glob("ray/ray_current_cluster")).read_text().strip(),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": serving.token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    command = [sys.executable, str(Path(__file__).with_name("driver.py")), str(POLICY["app_name"])]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield Driver(process)
        process.stdin.close()  # type: ignore[union-attr]

"""Runs a control plane in a separate process with a stand-in for Ray, which trains nothing but reports and answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_core.config import TrainConfig
from services.control_plane.core.store import migrate
from tests.clients.programs import Address, FlakyProxy
from tests.services.control_plane.attempts.crashes import LivelyRay, Plane
from tests.services.control_plane.conftest import API_KEY, free_port

WORDS = ["In", " aisle", " four", "."]


class ServingRay(LivelyRay):
    """A stand-in for Ray whose attempts report as if they trained, and whose models all give the same answer.

    A job of many epochs takes long enough to be paused.
    """

    def steps(self, config: TrainConfig) -> int:
        return super().steps(config) * (config.n_epochs or 1)

    def get(self, path: str) -> tuple[int, Any]:
        status, answer = super().get(path)
        if path.startswith("/api/serve"):
            answer["http_options"]["port"] = self.server.server_port
        return status, answer

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if "/v1/" not in path:
            return super().post(path, body)
        return 200, _streamed(body) if body.get("stream") else _answered(path, body)


def _answered(path: str, body: dict[str, Any]) -> dict[str, Any]:
    is_chat = path.endswith("/chat/completions")
    text = "".join(WORDS)
    said = {"message": {"role": "assistant", "content": text, "refusal": None}} if is_chat else {"text": text}
    return {
        "id": "cmpl-1",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None, **said}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8},
    }


def _streamed(body: dict[str, Any]) -> str:
    common = {"id": "cmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    choices = [{"index": 0, "delta": {"content": word}, "finish_reason": None} for word in WORDS]
    chunks = [json.dumps({**common, "choices": [choice]}) for choice in choices]
    return "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"])


@pytest.fixture(scope="module")
def address(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    folder: Path = tmp_path_factory.mktemp("clients")
    ray, hooks_port = ServingRay(step_seconds=0.1, dying=0), free_port()
    settings = {
        "DATABASE_URL": database_url,
        "RAYDPO_API_KEY": API_KEY,
        "RAYDPO_STORAGE_URL": (folder / "storage").as_uri(),
        "RAYDPO_MAX_RUNNING_JOBS": "8",
        "RAYDPO_WEBHOOK_URLS": json.dumps([f"http://127.0.0.1:{hooks_port}/"]),
    }
    migrate(database_url)
    plane = Plane(folder / "home", settings, f"http://127.0.0.1:{ray.server.server_port}")
    plane.start()
    plane.wait()
    proxy = FlakyProxy(plane.url)
    yield Address(plane.url, proxy, API_KEY, hooks_port)
    proxy.close()
    plane.kill()
    ray.server.shutdown()
    ray.server.server_close()

"""The control plane in this process, on a real database, without a Ray cluster: nothing answers at its address."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import uvicorn

from services.control_plane.app import create_app
from services.control_plane.settings import Settings
from services.control_plane.store import migrate

API_KEY = "rd-a-key-for-tests"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pair(number: int) -> bytes:
    row = {
        "input": {"messages": [{"role": "user", "content": f"What is {number} plus 1?"}]},
        "preferred_output": [{"role": "assistant", "content": f"It is {number + 1}."}],
        "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
    }
    return json.dumps(row).encode()


def pairs(count: int = 12) -> bytes:
    return b"\n".join(pair(number) for number in range(count)) + b"\n"


@pytest.fixture(scope="module")
def offline(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = Path(tmp_path_factory.mktemp("home"))
    return Settings(
        home=home,
        DATABASE_URL=database_url,
        storage_url=(home / "storage").as_uri(),
        api_key=API_KEY,
        advertised_url="http://127.0.0.1:9",
        ray_url=f"http://127.0.0.1:{free_port()}",
        models={"tiny": "/nowhere/tiny"},
        model_wait_seconds=0.2,
        dataset_uris=["https://", "hf://datasets/", "s3://bucket/rows/", f"{home.as_uri()}/data/"],
    )


@pytest.fixture(scope="module")
def settings(offline: Settings) -> Settings:
    return offline


@pytest.fixture(scope="module")
def base_url(settings: Settings) -> Iterator[str]:
    migrate(settings.database_url)
    port = free_port()
    config = uvicorn.Config(create_app(settings), host="127.0.0.1", port=port, log_level="warning", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client

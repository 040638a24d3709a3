"""What a control plane does beside its answers, and what becomes of it when that dies."""

import time
from pathlib import Path
from typing import Any

import openai
import psutil
import psycopg
import pytest

from services.control_plane.settings import Settings
from services.control_plane.store import migrate
from tests.services.control_plane.conftest import API_KEY, pair, serving, stored

LINES = 30_000


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        for number in range(LINES):
            file.write(pair(number) + b"\n")
    return path


@pytest.mark.slow
def test_a_check_outlives_a_killed_control_plane(offline: Settings, large: Path) -> None:
    migrate(offline.database_url)
    with serving(offline, at_once_bytes=0) as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY) as client:
            file = client.files.create(file=large, purpose="fine-tune")
            assert file.status == "uploaded"
        while not (checking := psutil.Process(process.pid).children()):
            time.sleep(0.05)
        process.kill()
    _, alive = psutil.wait_procs(checking, timeout=300)  # nobody reads what it prints
    assert not alive
    with serving(offline, at_once_bytes=0) as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY) as client:
        assert client.files.retrieve(file.id).status == "uploaded"
        found = client.files.wait_for_processing(file.id, poll_interval=0.5)
        assert found.status == "processed"
        extra: Any = found.model_extra
        assert extra["x_raydpo"]["report"]["num_rows"] == LINES
        assert extra["x_raydpo"]["checked_bytes"] == found.bytes
        client.files.delete(file.id)


@pytest.mark.slow
def test_a_control_plane_sweeps_when_it_starts_though_no_cluster_answers(offline: Settings) -> None:
    migrate(offline.database_url)
    with serving(offline) as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY) as client:
        file_id = client.files.create(file=("pairs.jsonl", pair(1)), purpose="fine-tune").id
    with psycopg.connect(offline.database_url) as connection:
        connection.execute("UPDATE files SET expires_at = now()")
    assert stored(offline, "files") == [file_id]
    with serving(offline):
        deadline = time.monotonic() + 300
        while stored(offline, "files"):
            assert time.monotonic() < deadline
            time.sleep(0.1)

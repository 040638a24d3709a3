"""A check in the background, and the death of the control plane that runs it."""

import time
from pathlib import Path

import openai
import psutil
import pytest

from services.control_plane.settings import Settings
from services.control_plane.store import migrate
from tests.services.control_plane.conftest import API_KEY, pair, serving

LINES = 200_000


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        for number in range(LINES):
            file.write(pair(number) + b"\n")
    return path


def test_a_check_outlives_a_killed_control_plane(offline: Settings, large: Path) -> None:
    migrate(offline.database_url)
    with serving(offline, at_once_bytes=0) as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY) as client:
            file = client.files.create(file=large, purpose="fine-tune")
            assert file.status == "uploaded"
        while not (checking := psutil.Process(process.pid).children()):
            time.sleep(0.05)
        process.kill()
    _, alive = psutil.wait_procs(checking, timeout=30)  # nobody reads what it prints
    assert not alive
    with serving(offline, at_once_bytes=0) as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY) as client:
        assert client.files.retrieve(file.id).status == "uploaded"
        seen = set()
        while (found := client.files.retrieve(file.id)).status == "uploaded":
            seen.add(found.model_extra["x_raydpo"]["checked_bytes"])  # type: ignore[index]
            time.sleep(0.5)
        assert found.status == "processed"
        assert found.model_extra["x_raydpo"]["report"]["num_rows"] == LINES  # type: ignore[index]
        assert len(seen) > 1
        client.files.delete(file.id)

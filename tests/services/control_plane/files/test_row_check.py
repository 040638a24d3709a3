"""What a control plane does beside its answers, and what becomes of it when that dies."""

import signal
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import psycopg
import pyarrow as pa
import pytest

from services.control_plane.core.store import migrate
from services.control_plane.files import row_check
from services.control_plane.settings import Settings
from tests.services.control_plane import conftest
from tests.services.control_plane.conftest import API_KEY, pair, pairs, serving, stored

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


def arrow(path: Path) -> Path:
    """A file whose column's type, which a refusal quotes, has a NUL in its name."""
    kind = pa.list_view(pa.field("a\0b", pa.int32()))
    table = pa.table({"x": pa.array([[1]], kind)})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.slow
def test_a_file_whose_check_cannot_be_told_keeps_no_other_waiting(offline: Settings, tmp_path: Path) -> None:
    migrate(offline.database_url)
    sound = tmp_path / "sound.jsonl"
    sound.write_bytes(pairs())
    with (
        serving(offline, at_once_bytes=0) as (process, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY) as client,
    ):
        crafted = client.files.create(file=arrow(tmp_path / "crafted.arrow"), purpose="fine-tune")
        unreadable = client.files.create(file=sound, purpose="fine-tune")
        with psycopg.connect(offline.database_url, autocommit=True) as rows:
            rows.execute("UPDATE files SET uri = 'https://[' WHERE id = %s", [unreadable.id])
        last = client.files.create(file=sound, purpose="fine-tune")
        assert client.files.wait_for_processing(last.id, poll_interval=0.2, max_wait_seconds=60).status == "processed"
        found = client.files.wait_for_processing(crafted.id, poll_interval=0.2, max_wait_seconds=60)
        assert found.status == "error"
        assert "list_view<a\ufffdb: int32>" in (found.status_details or "")
        assert process.poll() is None


def test_what_a_check_found_and_the_database_refuses_is_a_refusal_of_the_file(
    client: openai.OpenAI, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    monkeypatch.setattr(row_check, "survey_file", lambda uri, reading: {"report": {"a\0b": 1}, "refusal": None})
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute("UPDATE files SET report = NULL WHERE id = %s", [file.id])
    found = client.files.wait_for_processing(file.id, poll_interval=0.2, max_wait_seconds=60)
    assert "cannot be kept" in (found.status_details or "")


ENDING = """
import asyncio
from services.control_plane.files.row_check import Surveyor

async def ends(self):
    await asyncio.sleep(1)
    raise RuntimeError("unforeseen")

Surveyor.run = ends
"""


@pytest.mark.slow
def test_a_part_that_ends_ends_the_process(offline: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate(offline.database_url)
    monkeypatch.setattr(conftest, "SERVER", ENDING + conftest.SERVER)
    with serving(offline) as (process, _):
        assert process.wait(60) == -signal.SIGTERM

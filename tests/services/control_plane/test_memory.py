"""Tests how much memory the control plane needs, as a separate process, while large files are uploaded."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from services import storage
from services.control_plane.core.store import migrate
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, serving

MIB = 2**20


@pytest.fixture(scope="module")
def server(offline: Settings) -> Iterator[tuple[psutil.Process, str]]:
    migrate(offline.database_url)
    with serving(offline) as (process, url):
        yield psutil.Process(process.pid), url


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes 300 MiB of pairs with long answers once, and returns the file."""
    row = {"prompt": "Why?", "chosen": "because " * 2**16, "rejected": "so " * 2**16}
    line = json.dumps(row).encode() + b"\n"
    path = tmp_path_factory.mktemp("rows") / "large.jsonl"
    with path.open("wb") as file:
        for _ in range(300 * MIB // len(line) + 1):
            file.write(line)
    return path


def peak_bytes(process: psutil.Process) -> int:
    """Returns the most bytes of memory that the process has had resident at the same time."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_sent(
    server: tuple[psutil.Process, str], large: Path, offline: Settings
) -> None:
    process, url = server
    with openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0) as client:
        assert client.files.create(file=large, purpose="fine-tune").bytes == large.stat().st_size
        done = client.uploads.upload_file_chunked(file=large, mime_type="application/jsonl", purpose="fine-tune")
        assert done.file is not None
        assert done.file.status == "processed"
        with client.files.with_streaming_response.content(done.file.id) as answer:
            assert sum(map(len, answer.iter_bytes(MIB))) == large.stat().st_size
    unsent = storage.MAX_UNSENT if offline.storage_url.startswith("s3://") else 0
    assert peak_bytes(process) < 200 * MIB + unsent

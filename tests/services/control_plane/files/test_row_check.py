"""Tests the checks that a control plane makes in the background, and what becomes of a check if the control plane
dies."""

import asyncio
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import psycopg
import pyarrow as pa
import pytest

from services.control_plane.core import leases
from services.control_plane.core.leases import Leaseholder
from services.control_plane.core.store import Store, migrate
from services.control_plane.files import row_check
from services.control_plane.settings import Settings
from tests.services.control_plane import conftest
from tests.services.control_plane.conftest import (
    API_KEY,
    answering,
    api_of,
    new_key,
    new_project,
    pair,
    pairs,
    serving,
    stored,
    wait_for,
)

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
        wait_for(lambda: not stored(offline, "files"))


def arrow(path: Path) -> Path:
    """Writes an Arrow file with a column whose type has a NUL in its name, and returns its path. A refusal quotes the
    type."""
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
        assert client.files.wait_for_processing(last.id, poll_interval=0.2, max_wait_seconds=300).status == "processed"
        found = client.files.wait_for_processing(crafted.id, poll_interval=0.2, max_wait_seconds=300)
        assert found.status == "error"
        assert "list_view<a\ufffdb: int32>" in (found.status_details or "")
        assert process.poll() is None


def unchecked(settings: Settings, project: str, *names: str) -> None:
    """Adds training files whose bytes are missing, so that their checks fail and are postponed."""
    with psycopg.connect(settings.database_url) as rows:
        rows.execute("INSERT INTO projects (id, name) VALUES (%s, %s) ON CONFLICT DO NOTHING", [project, project])
        for name in names:
            rows.execute(
                "INSERT INTO files (id, created_at, project_id, filename, purpose, num_bytes, sha256, uri) "
                "VALUES (%s, clock_timestamp(), %s, 'a', 'fine-tune', 9, '', 'file:///nowhere/none')",
                [name, project],
            )


def no_files(settings: Settings) -> None:
    with psycopg.connect(settings.database_url) as rows:
        rows.execute("DELETE FROM files")
        rows.execute("DELETE FROM leases WHERE name LIKE 'check of %'")


def test_projects_take_turns_with_their_checks_and_those_put_off_keep_nobody_waiting(offline: Settings) -> None:
    migrate(offline.database_url)
    no_files(offline)
    unchecked(offline, "proj_a", *(f"file-a{number:02d}" for number in range(25)))
    unchecked(offline, "proj_b", "file-b00", "file-b01")

    async def looked_at(count: int) -> list[str]:
        """Runs `count` ticks of the checker, and returns the files whose checks were begun, in order."""
        opened, told = Store(offline.database_url), list[str]()
        row_checker = Leaseholder(opened, row_check.RowChecker(opened), holder="a test")
        for _ in range(count):
            await row_checker.run_once()
            with psycopg.connect(offline.database_url) as rows:
                names = rows.execute("SELECT right(name, 8) FROM leases WHERE name LIKE 'check of %'").fetchall()
            (new,) = {str(name) for (name,) in names} - set(told)
            told.append(new)
        await opened.close()
        return told

    begun = asyncio.run(looked_at(27))
    assert begun[:5] == ["file-a00", "file-b00", "file-a01", "file-b01", "file-a02"]
    assert begun[5:] == [f"file-a{number:02d}" for number in range(3, 25)]
    no_files(offline)


def test_the_pauses_after_failed_checks_grow_with_the_files_age_by_the_databases_clock(offline: Settings) -> None:
    migrate(offline.database_url)
    no_files(offline)
    unchecked(offline, "proj_a", "file-new", "file-old")

    async def ticks() -> None:
        opened = Store(offline.database_url)
        for _ in range(2):
            await Leaseholder(opened, row_check.RowChecker(opened), holder="a test").run_once()
        await opened.close()

    with psycopg.connect(offline.database_url, autocommit=True) as rows:
        rows.execute("UPDATE files SET created_at = now() - interval '40 minutes' WHERE id = 'file-old'")
        asyncio.run(ticks())
        found = rows.execute("SELECT name, (expires_at - clock_timestamp()) / 30 FROM leases WHERE name LIKE 'check%'")
        pauses = {name: pause.total_seconds() for name, pause in found.fetchall()}
    assert 0 < pauses["check of file-new"] <= 1
    assert 30 < pauses["check of file-old"] <= 41
    assert row_check.pause_seconds(80_000) == 3600
    no_files(offline)


def test_a_check_against_a_model_of_a_file_that_is_not_checked_is_told_how_far_that_is(
    api: httpx.Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: Any) -> None:
        return None

    monkeypatch.setattr(row_check.RowChecker, "claim", nothing)
    time.sleep(leases.TICK_SECONDS)
    unchecked(settings, "proj_other", "file-of-another")
    unchecked(settings, "proj_default", "file-first", "file-second", "file-third")

    def refusal(file_id: str) -> str:
        refused = api.post("/x/datasets/check", json={"model": "tiny", "training_file": file_id})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_training_file")
        return str(refused.json()["error"]["message"])

    assert (
        "The file file-first is not checked yet; 0 older files of the project must be checked first; wait"
    ) in refusal("file-first")
    assert (
        "The file file-second is not checked yet; 1 older file of the project must be checked first; wait"
    ) in refusal("file-second")
    assert (
        "The file file-third is not checked yet; 2 older files of the project must be checked first; wait"
    ) in refusal("file-third")
    with psycopg.connect(settings.database_url) as rows:
        rows.execute("UPDATE files SET num_checked = 4 WHERE id = 'file-first'")
    assert "The file file-first is still being checked, 4 of 9 bytes so far; wait" in refusal("file-first")
    no_files(settings)


def test_what_a_check_found_and_the_database_refuses_is_a_refusal_of_the_file(
    client: openai.OpenAI, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    monkeypatch.setattr(row_check, "check_rows", lambda uri, reading: {"report": {"a\0b": 1}, "refusal": None})
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute("UPDATE files SET report = NULL WHERE id = %s", [file.id])
    found = client.files.wait_for_processing(file.id, poll_interval=0.2, max_wait_seconds=300)
    assert "cannot be stored" in (found.status_details or "")


ENDING = """
import asyncio
from services.control_plane.core.leases import Leaseholder

async def ends(self):
    await asyncio.sleep(1)
    raise RuntimeError("unforeseen")

Leaseholder.run = ends
"""


class HeldChecks:
    """The URIs of files whose check was asked for, and of those whose check began. Checks end when `go_on` is set."""

    def __init__(self) -> None:
        self.asked, self.begun = list[str](), list[str]()
        self.go_on = threading.Event()

    async def check(self, uri: str, *_: Any) -> dict[str, Any]:
        self.begun.append(uri)
        while not self.go_on.is_set():  # noqa: ASYNC110 - the test's thread sets it
            await asyncio.sleep(0.01)
        return {"report": {"kind": "pairs", "num_rows": 12}, "refusal": None}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> HeldChecks:
    checks, run_check = HeldChecks(), row_check._run_check

    async def ask(uri: str, *arguments: Any) -> dict[str, Any]:
        checks.asked.append(uri)
        return await run_check(uri, *arguments)

    monkeypatch.setattr(row_check, "IN_PROCESS_BYTES", 100)
    monkeypatch.setattr(row_check, "_run_program", checks.check)
    monkeypatch.setattr(row_check, "_run_check", ask)
    return checks


def upload(by: httpx.Client) -> str:
    sent = {"files": {"file": ("p.jsonl", pairs())}, "data": {"purpose": "fine-tune"}}
    return str(by.post("/files", **sent).raise_for_status().json()["id"])


@pytest.mark.slow
@pytest.mark.parametrize(("cores", "checks"), [(64, 4), (3, 3), (1, 2)])
def test_checks_at_once_are_few_however_many_cores_there_are(
    cores: int, checks: int, offline: Settings, held: HeldChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    with answering(offline) as url, api_of(url, API_KEY) as api, ThreadPoolExecutor(13) as threads:
        sent = [threads.submit(upload, api) for _ in range(13)]
        wait_for(lambda: len(held.asked) == 13 and len(held.begun) >= checks)
        assert len(held.begun) == checks
        held.go_on.set()
        assert len({one.result(300) for one in sent}) == 13


def test_uploads_of_one_project_delay_the_check_of_anothers_by_a_turn_or_two(
    base_url: str, api: httpx.Client, held: HeldChecks
) -> None:
    many, other = (api_of(base_url, new_key(api, project_id=new_project(api, name))["value"]) for name in "mo")
    with many, other, ThreadPoolExecutor(13) as threads:
        sent = [threads.submit(upload, many) for _ in range(12)]
        wait_for(lambda: len(held.asked) == 12 and len(held.begun) >= 2)
        last = threads.submit(upload, other)
        wait_for(lambda: len(held.asked) == 13)
        at_once = len(held.begun)
        held.go_on.set()
        file_id = last.result(300)
        assert len({one.result(300) for one in sent}) == 12
    (place,) = (number for number, uri in enumerate(held.begun) if file_id in uri)
    assert place < at_once + 3


def test_a_part_that_ends_ends_the_process(offline: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate(offline.database_url)
    monkeypatch.setattr(conftest, "SERVER", ENDING + conftest.SERVER)
    with serving(offline) as (process, _):
        assert process.wait(300) == -signal.SIGTERM

"""What nobody needs any more is removed; what somebody needs stays."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psycopg
import pytest

from services.control_plane.launcher import Launcher
from services.control_plane.settings import Settings
from services.control_plane.store import Store
from services.control_plane.sweeper import GRACE_SECONDS, MOST, Sweeper
from tests.services.control_plane.conftest import pairs


@pytest.fixture
def folder(settings: Settings) -> Path:
    return Path(settings.home, "storage")


@pytest.fixture
def rows(settings: Settings) -> Iterator[psycopg.Connection]:
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        yield connection


def sweep(settings: Settings) -> None:
    """As a control plane does that begins to lead."""

    async def run() -> None:
        store, launcher = Store(settings.database_url), Launcher(settings)
        await Sweeper(store, launcher, settings).sweep()
        await launcher.close()
        await store.close()

    asyncio.run(run())


def create(client: openai.OpenAI) -> str:
    return client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id


def age(file: Path) -> None:
    old = time.time() - GRACE_SECONDS - 60
    os.utime(file, (old, old))


def test_bytes_of_an_expired_file_stay_until_the_jobs_that_need_it_end(
    client: openai.OpenAI, settings: Settings, folder: Path, rows: psycopg.Connection
) -> None:
    needed, idle = create(client), create(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=needed, method={"type": "dpo"})
    rows.execute("UPDATE files SET expires_at = now()")
    sweep(settings)
    assert Path(folder, "files", needed).exists()
    assert not Path(folder, "files", idle).exists()
    rows.execute("UPDATE jobs SET observed = 'cancelled', finished_at = now() WHERE id = %s", [job.id])
    sweep(settings)
    assert not Path(folder, "files", needed).exists()


def test_expired_files_that_paused_jobs_need_hide_no_others(
    client: openai.OpenAI, settings: Settings, folder: Path, rows: psycopg.Connection
) -> None:
    needed, idle = create(client), create(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=needed, method={"type": "dpo"})
    client.fine_tuning.jobs.pause(job.id)
    others = "'file-' || n, created_at, now() - interval '1 day', filename, purpose, num_bytes, sha256, uri, project_id"
    columns = "id, created_at, expires_at, filename, purpose, num_bytes, sha256, uri, project_id"
    rows.execute(
        f"INSERT INTO files ({columns}) SELECT {others} FROM files, generate_series(1, {MOST}) n WHERE id = %s",
        [needed],
    )
    rows.execute(
        "INSERT INTO jobs (id, project_id, spec, model_source, model_root, desired, observed, version, priority)"
        " SELECT 'ftjob-' || n, project_id, spec || jsonb_build_object('validation_file', 'file-' || n), model_source,"
        f" model_root, desired, observed, 1, 0 FROM jobs, generate_series(1, {MOST}) n WHERE id = %s",
        [job.id],
    )
    rows.execute("UPDATE files SET expires_at = now() WHERE id = %s", [idle])
    sweep(settings)
    assert not Path(folder, "files", idle).exists()
    rows.execute("UPDATE jobs SET observed = 'cancelled', finished_at = now() WHERE observed = 'paused'")


def test_only_old_bytes_that_no_row_names_are_removed(client: openai.OpenAI, settings: Settings, folder: Path) -> None:
    named, deleted = create(client), create(client)
    left = Path(folder, "files", deleted)
    kept = left.read_bytes()
    client.files.delete(deleted)
    left.write_bytes(kept)  # as if deleting had failed
    fresh, broken_off = Path(folder, "files", "file-fresh"), Path(folder, "files", ".file-half.1234")
    for file in (fresh, broken_off):
        file.write_bytes(b"{}")
    for file in (Path(folder, "files", named), left, broken_off):
        age(file)
    sweep(settings)
    assert {file.name for file in Path(folder, "files").iterdir()} == {named, "file-fresh"}


def test_parts_are_removed_with_their_upload(
    client: openai.OpenAI, settings: Settings, folder: Path, rows: psycopg.Connection
) -> None:
    def begin() -> str:
        upload = client.uploads.create(filename="a", purpose="fine-tune", bytes=2, mime_type="text/plain")
        client.uploads.parts.create(upload.id, data=b"{}")
        return upload.id

    pending, expired, cancelled = begin(), begin(), begin()
    client.uploads.cancel(cancelled)
    late = Path(folder, "uploads", cancelled, "part_late")
    late.parent.mkdir(exist_ok=True)
    late.write_bytes(b"{}")
    rows.execute("UPDATE uploads SET expires_at = now() WHERE id = %s", [expired])
    sweep(settings)
    assert [path.name for path in Path(folder, "uploads").iterdir()] == [pending]
    states: Any = rows.execute("SELECT state FROM uploads WHERE id = %s", [expired]).fetchone()
    assert states == ("expired",)


def test_old_answers_and_leases_are_forgotten(
    settings: Settings, client: openai.OpenAI, rows: psycopg.Connection
) -> None:
    create(client)
    rows.execute("UPDATE answers SET created_at = now() - interval '25 hours'")
    rows.execute("INSERT INTO leases VALUES ('old', 'a', now() - interval '25 hours')")
    sweep(settings)


@pytest.mark.usefixtures("base_url")
def test_webhooks_are_forgotten_a_month_after_they_were_brought(settings: Settings, rows: psycopg.Connection) -> None:
    endpoint = "'we_old', 'proj_default', 'a', 'http://localhost:1/', '{}', 's'"
    rows.execute(f"INSERT INTO webhook_endpoints (id, project_id, name, url, event_types, secret) VALUES ({endpoint})")
    for name, due_at, days in (("brought", None, 31), ("due", "3000-01-01", 31), ("new", None, 1)):
        values = "'we_old', %s, '{}', 1, %s, now() - make_interval(days => %s)"
        columns = "endpoint_id, event_id, body, num_sends, due_at, created_at"
        rows.execute(f"INSERT INTO outbox ({columns}) VALUES ({values})", [name, due_at, days])
    sweep(settings)
    assert rows.execute("SELECT event_id FROM outbox ORDER BY id").fetchall() == [("due",), ("new",)]

"""Tests that the service removes what nobody needs any more, and keeps everything else."""

import asyncio
import os
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

import openai
import psycopg
import pytest
from moto.backends import get_backend
from psycopg.types.json import Jsonb

from services import storage
from services.control_plane import cleanup
from services.control_plane.cleanup import MOST, Sweeper
from services.control_plane.core.store import Store
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pairs, stored
from tests.services.control_plane.steps import counted, insert_job, insert_steps
from tests.services.s3 import S3


@pytest.fixture(scope="module", params=["local", "s3"])
def storage_url(request: pytest.FixtureRequest, s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> str:
    return s3_server.new_folder() if request.param == "s3" else tmp_path_factory.mktemp("storage").as_uri()


@pytest.fixture
def rows(settings: Settings) -> Iterator[psycopg.Connection]:
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        yield connection


def sweep(settings: Settings) -> None:
    """Cleans up as a control plane does when it begins to lead."""

    async def run() -> None:
        store = Store(settings.database_url)
        ray_api = RayApi(settings, store.instance)
        await Sweeper(store, ray_api, settings).sweep()
        await ray_api.close()
        await store.close()

    asyncio.run(run())


def create(client: openai.OpenAI) -> str:
    return client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id


def age(settings: Settings, *names: str, days: float) -> None:
    """Moves the time at which a file in storage was written `days` into the past."""
    split, seconds = urlsplit(storage.join(settings.storage_url, *names)), days * 86_400
    if split.scheme == "file":
        os.utime(unquote(split.path), (time.time() - seconds, time.time() - seconds))
    else:
        key = get_backend("s3")["123456789012"]["aws"].buckets[split.netloc].keys[split.path[1:]]
        key.last_modified -= timedelta(seconds=seconds)


def write(settings: Settings, *names: str, days: float = 0) -> None:
    storage.write_bytes(storage.join(settings.storage_url, *names), b"{}")
    age(settings, *names, days=days)


def test_bytes_of_an_expired_file_stay_until_the_jobs_that_need_it_end(
    client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    needed, idle = create(client), create(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=needed, method={"type": "dpo"})
    client.fine_tuning.jobs.pause(job.id)
    rows.execute("UPDATE files SET expires_at = now()")
    sweep(settings)
    assert needed in stored(settings, "files")
    assert idle not in stored(settings, "files")
    rows.execute("UPDATE jobs SET observed = 'cancelled', finished_at = now() WHERE id = %s", [job.id])
    sweep(settings)
    assert needed not in stored(settings, "files")


def test_expired_files_that_paused_jobs_need_hide_no_others(
    client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    needed, idle = sorted(create(client) for _ in range(2))
    job = client.fine_tuning.jobs.create(model="tiny", training_file=needed, method={"type": "dpo"})
    client.fine_tuning.jobs.pause(job.id)
    name = f"'{needed}-' || n"
    others = f"{name}, created_at, now() - interval '1 day', filename, purpose, num_bytes, sha256, uri, project_id"
    columns = "id, created_at, expires_at, filename, purpose, num_bytes, sha256, uri, project_id"
    rows.execute(
        f"INSERT INTO files ({columns}) SELECT {others} FROM files, generate_series(1, {MOST}) n WHERE id = %s",
        [needed],
    )
    rows.execute(
        "INSERT INTO jobs (id, project_id, spec, model_source, model_root, desired, observed, version, priority)"
        f" SELECT '{job.id}-' || n, project_id, spec || jsonb_build_object('validation_file', {name}), model_source,"
        f" model_root, desired, observed, 1, 0 FROM jobs, generate_series(1, {MOST}) n WHERE id = %s",
        [job.id],
    )
    rows.execute("UPDATE files SET expires_at = now() WHERE id = %s", [idle])
    rows.execute("CLUSTER files USING files_pkey")  # the idle one stands behind all that are needed
    sweep(settings)
    assert idle not in stored(settings, "files")
    rows.execute("UPDATE jobs SET observed = 'cancelled', finished_at = now() WHERE observed = 'paused'")


def test_old_bytes_that_no_row_names_are_put_away_and_come_back_when_a_row_names_them_again(
    client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    named, deleted, lost = create(client), create(client), create(client)
    client.files.delete(deleted)
    write(settings, "files", deleted, days=2)  # as if deleting had failed
    row = rows.execute("DELETE FROM files WHERE id = %s RETURNING *", [lost]).fetchone()
    assert row is not None  # as in a database that was restored to an earlier moment
    for name in (named, lost):
        age(settings, "files", name, days=2)
    write(settings, "files", "file-fresh")
    if settings.storage_url.startswith("file:"):
        write(settings, "files", ".file-half.1234", days=2)  # a write that broke off
    sweep(settings)
    assert set(stored(settings, "files")) & {named, deleted, lost, "file-fresh"} == {named, "file-fresh"}
    assert not [name for name in stored(settings, "files") if name.startswith(".")]
    assert stored(settings, "trash") == [lost]
    sweep(settings)
    assert stored(settings, "trash") == [lost]

    rows.execute(f"INSERT INTO files VALUES ({', '.join(['%s'] * len(row))})", [_adapted(value) for value in row])
    sweep(settings)
    assert stored(settings, "trash") == []
    assert client.files.content(lost).read() == pairs()


def _adapted(value: Any) -> Any:
    return Jsonb(value) if isinstance(value, dict) else value


@pytest.mark.usefixtures("base_url")
def test_the_trash_is_kept_for_a_month(settings: Settings) -> None:
    write(settings, "trash", "file-old", days=31)
    write(settings, "trash", "file-new", days=29)
    sweep(settings)
    assert stored(settings, "trash") == ["file-new"]


def test_what_a_row_names_is_never_deleted_from_the_trash(
    client: openai.OpenAI, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "MOST", 1)
    named = {create(client), create(client)}
    for name in named:
        place, trash = (storage.join(settings.storage_url, folder, name) for folder in ("files", "trash"))
        storage.move(place, trash)
        age(settings, "trash", name, days=31)
    for _ in named:
        assert named <= {*stored(settings, "files"), *stored(settings, "trash")}
        sweep(settings)
    assert named <= set(stored(settings, "files"))


def test_parts_are_removed_with_their_upload(
    client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    def begin() -> str:
        upload = client.uploads.create(filename="a", purpose="fine-tune", bytes=2, mime_type="text/plain")
        client.uploads.parts.create(upload.id, data=b"{}")
        return upload.id

    pending, expired, cancelled = begin(), begin(), begin()
    client.uploads.cancel(cancelled)
    write(settings, "uploads", cancelled, "part_late")
    write(settings, "uploads", "upload_lost", "part_old", days=2)
    write(settings, "uploads", "upload_lost_lately", "part_new")  # whoever restored the database may do so again
    rows.execute("UPDATE uploads SET expires_at = now() WHERE id = %s", [expired])
    sweep(settings)
    left = {name for name in (pending, expired, cancelled) if stored(settings, "uploads", name)}
    assert left == {pending}
    assert not stored(settings, "uploads", "upload_lost")
    assert stored(settings, "uploads", "upload_lost_lately")
    states: Any = rows.execute("SELECT state FROM uploads WHERE id = %s", [expired]).fetchone()
    assert states == ("expired",)


def test_models_whose_files_cannot_be_removed_keep_no_others(
    client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=create(client), method={"type": "dpo"})
    client.fine_tuning.jobs.cancel(job.id)
    write(settings, "runs", job.id, "export", "model.safetensors")
    gone = storage.join(settings.storage_url, "runs", job.id, "export")
    add = (
        "INSERT INTO models (id, project_id, source, root, job_id, deleted_at) "
        "SELECT 'ft:' || n, 'proj_default', %s, 'tiny', %s, now() - n * interval '1 day' "
        "FROM generate_series(%s::int, %s::int) n"
    )
    rows.execute(add, ["elsewhere://bucket/export", job.id, 1, MOST])
    rows.execute(add, [gone, job.id, 0, 0])  # the last one that was deleted
    for _ in range(50):
        sweep(settings)
        if not storage.exists(storage.join(gone, "model.safetensors")):
            break
    assert not storage.exists(storage.join(gone, "model.safetensors"))
    rows.execute("DELETE FROM models")


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
    rows.execute(
        f"INSERT INTO webhook_endpoints (id, project_id, name, url, event_types, secret) VALUES ({endpoint})"
        " ON CONFLICT DO NOTHING"
    )
    rows.execute("DELETE FROM outbox")
    for name, due_at, days in (("brought", None, 31), ("due", "3000-01-01", 31), ("new", None, 1)):
        values = "'we_old', %s, '{}', 1, %s, now() - make_interval(days => %s)"
        columns = "endpoint_id, event_id, body, num_sends, due_at, created_at"
        rows.execute(f"INSERT INTO outbox ({columns}) VALUES ({values})", [name, due_at, days])
    sweep(settings)
    assert rows.execute("SELECT event_id FROM outbox ORDER BY id").fetchall() == [("due",), ("new",)]


def test_past_steps_are_packed_only_when_an_upgrade_must_be_over(
    settings: Settings, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control planes of the release before, which run until then, cannot read what is packed."""
    job_id = insert_job(settings.database_url, f"ftjob-{secrets.token_hex(12)}")
    insert_steps(settings.database_url, job_id, range(1, 3001))
    sweep(settings)
    assert counted(settings.database_url, job_id) == (3000, 0)
    monkeypatch.setattr(cleanup, "UPGRADE_SECONDS", -1)
    sweep(settings)
    assert counted(settings.database_url, job_id) == (2000, 1)


def begin_attempt(rows: psycopg.Connection, job_id: str, days: float) -> None:
    rows.execute(
        "INSERT INTO attempts (job_id, number, created_at, state, token, next_seq, num_accelerators, failed)"
        " VALUES (%s, 1, now() - make_interval(secs => %s), 'running', '', 0, 0, false)",
        [job_id, days * 86_400],
    )


def test_prepared_data_go_a_month_after_their_last_use(
    client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    def prepare(name: str, **days: float) -> None:
        for file, age_of_it in days.items():
            write(settings, "prepared", "proj_default", name, file, days=age_of_it)
        write(settings, "prepared", "proj_default", name, "scores-1", "part", days=99)

    def left() -> list[str]:
        return storage.list_folders(storage.join(settings.storage_url, "prepared", "proj_default"))

    prepare("new", part=40, used=29)
    prepare("old", part=40, used=31)
    prepare("before", part=31, manifest=31)  # of a release that noted no use
    job = client.fine_tuning.jobs.create(model="tiny", training_file=create(client), method={"type": "dpo"})
    begin_attempt(rows, job.id, days=32)  # it may have noted its use of any of them when it began
    sweep(settings)
    assert left() == ["before", "new", "old"]
    rows.execute("UPDATE attempts SET created_at = now() WHERE job_id = %s", [job.id])
    sweep(settings)
    assert left() == ["before", "new"]
    rows.execute("UPDATE attempts SET state = 'ended', ended_at = now() WHERE job_id = %s", [job.id])
    client.fine_tuning.jobs.cancel(job.id)
    sweep(settings.model_copy(update={"prepared_days": 0}))
    assert left() == ["before", "new"]
    sweep(settings)
    assert left() == ["new"]

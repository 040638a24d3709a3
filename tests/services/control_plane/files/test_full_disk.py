"""Tests a disk that is really full: errors say so, nothing incomplete is kept or served, and free space is enough
again."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from services.control_plane.settings import Settings
from tests.conftest import Disk
from tests.services.control_plane.attempts.test_reconciler import reports, spool, ticks
from tests.services.control_plane.conftest import FakeRay, pair, pairs

ROWS = b"\n".join(pair(number) for number in range(10_000))  # 2 MB


@pytest.fixture(scope="module")
def settings(offline: Settings, small_disk: Disk, fake_ray: FakeRay) -> Settings:
    storage_url, ray_url = (small_disk.folder / "storage").as_uri(), f"http://127.0.0.1:{fake_ray.server.server_port}"
    return offline.model_copy(update={"storage_url": storage_url, "ray_url": ray_url})


@pytest.fixture
def disk(small_disk: Disk) -> Any:
    yield small_disk
    small_disk.make_room()


def files_on(disk: Disk) -> set[str]:
    """Returns the paths of all files on the disk, hidden or not, except the one that fills it."""
    found = (Path(folder, name) for folder, _, names in os.walk(disk.folder) for name in names)
    return {str(path) for path in found if path.name != "filler"}


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(openai.InternalServerError, match="storage is full") as error:
        call()
    assert (error.value.status_code, error.value.code) == (503, "storage_full")
    assert error.value.response.headers["retry-after"] == "30"


@pytest.mark.parametrize("leave", [0, 1 << 20])
def test_a_file_that_does_not_fit_is_refused_by_name_and_taken_when_there_is_room(
    client: openai.OpenAI, disk: Disk, leave: int
) -> None:
    def upload() -> Any:
        return client.files.create(file=("pairs.jsonl", ROWS), purpose="fine-tune")

    before, listed = files_on(disk), client.files.list().data
    disk.fill(leave=leave)
    refused(upload)
    assert files_on(disk) == before
    assert client.files.list().data == listed
    disk.make_room()
    file = upload()
    assert client.files.content(file.id).content == ROWS
    client.files.delete(file.id)


def test_a_full_tmpdir_is_the_same(client: openai.OpenAI, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk.folder))
    disk.fill()
    refused(lambda: client.files.create(file=("pairs.jsonl", ROWS), purpose="fine-tune"))
    disk.make_room()
    file = client.files.create(file=("pairs.jsonl", ROWS), purpose="fine-tune")
    assert file.bytes == len(ROWS)
    client.files.delete(file.id)


def test_an_upload_in_parts_goes_on_where_the_disk_was_full(client: openai.OpenAI, disk: Disk) -> None:
    halves = ROWS[: len(ROWS) // 2], ROWS[len(ROWS) // 2 :]
    upload = client.uploads.create(filename="a", purpose="fine-tune", bytes=len(ROWS), mime_type="application/jsonl")
    first = client.uploads.parts.create(upload.id, data=halves[0])
    before = files_on(disk)
    disk.fill(leave=len(halves[1]) // 2)
    refused(lambda: client.uploads.parts.create(upload.id, data=halves[1]))
    assert files_on(disk) == before
    disk.make_room()
    second = client.uploads.parts.create(upload.id, data=halves[1])
    before = files_on(disk)
    disk.fill(leave=len(ROWS) // 2)
    refused(lambda: client.uploads.complete(upload.id, part_ids=[first.id, second.id]))
    assert files_on(disk) == before
    disk.make_room()
    file = client.uploads.complete(upload.id, part_ids=[first.id, second.id]).file
    assert file is not None
    assert client.files.content(file.id).content == ROWS
    client.files.delete(file.id)


def test_a_job_begins_and_ends_when_there_is_room(
    client: openai.OpenAI, settings: Settings, disk: Disk, fake_ray: FakeRay
) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    ticks(settings, 1)
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"}).id
    disk.fill()
    ticks(settings, 2)
    assert fake_ray.jobs == {}  # what its driver reads could not be written
    disk.make_room()
    ticks(settings, 1)
    assert fake_ray.jobs == {f"{job_id}-1": "RUNNING"}

    spool(settings, job_id, 1, reports(settings, job_id))
    fake_ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    before = files_on(disk)
    disk.fill()
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    assert files_on(disk) == before
    disk.make_room()
    ticks(settings, 1)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded"
    assert client.files.content(job.result_files[0]).text.count("\n") == 4

"""Tests /v1/uploads with OpenAI's unmodified client."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import psycopg
import pytest

from services import storage
from services.control_plane.files import row_check
from services.control_plane.files.uploads import PENDING_FOR
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pair, pairs, stored

DATA = pairs(40)
MD5 = hashlib.md5(DATA).hexdigest()


def begin(client: openai.OpenAI, data: bytes = DATA, **more: Any) -> str:
    return client.uploads.create(
        filename="pairs.jsonl", purpose="fine-tune", bytes=len(data), mime_type="application/jsonl", **more
    ).id


def send(client: openai.OpenAI, upload_id: str, data: bytes) -> str:
    return client.uploads.parts.create(upload_id, data=data).id


def parts_of(settings: Settings, upload_id: str) -> list[str]:
    return stored(settings, "uploads", upload_id)


def test_the_clients_own_chunks_become_a_file_with_a_life(client: openai.OpenAI, settings: Settings) -> None:
    path = settings.home / "pairs.jsonl"
    path.write_bytes(DATA)
    done = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=1000, md5=MD5
    )
    assert done.status == "completed"
    assert done.file is not None
    assert done.file.status == "processed"
    assert client.files.content(done.file.id).read() == DATA
    assert parts_of(settings, done.id) == []

    upload_id = begin(client, expires_after={"anchor": "created_at", "seconds": 3600})
    file = client.uploads.complete(upload_id, part_ids=[send(client, upload_id, DATA)]).file
    assert file is not None
    assert file.expires_at == file.created_at + 3600


def test_what_does_not_fit_together_is_refused_and_can_be_mended(client: openai.OpenAI) -> None:
    upload_id = begin(client)
    half = send(client, upload_id, DATA[:700])
    with pytest.raises(openai.BadRequestError, match=f"700 bytes.* {len(DATA)}") as refused:
        client.uploads.complete(upload_id, part_ids=[half])
    assert refused.value.param == "part_ids"
    with pytest.raises(openai.BadRequestError, match="names part_none, which is not a part"):
        client.uploads.complete(upload_id, part_ids=[half, "part_none"])
    rest = send(client, upload_id, DATA[700:])
    with pytest.raises(openai.BadRequestError, match=MD5) as refused:
        client.uploads.complete(upload_id, part_ids=[half, rest], md5="0" * 32)
    assert refused.value.param == "md5"
    with pytest.raises(openai.BadRequestError, match="Line 1 is not") as refused:
        client.uploads.complete(upload_id, part_ids=[rest, half])
    assert refused.value.code == "invalid_file_format"
    assert client.uploads.complete(upload_id, part_ids=[half, rest], md5=MD5).status == "completed"


def test_nothing_is_left_of_a_refused_completion(client: openai.OpenAI, settings: Settings) -> None:
    before = stored(settings, "files")
    upload_id = begin(client, b"{}")
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload_id, part_ids=[send(client, upload_id, b"{}")])
    assert stored(settings, "files") == before
    assert len(parts_of(settings, upload_id)) == 1


def test_parts_that_are_gone_from_storage_are_to_be_sent_again(client: openai.OpenAI, settings: Settings) -> None:
    upload_id = begin(client)
    part = send(client, upload_id, DATA)
    storage.delete(storage.join(settings.storage_url, "uploads", upload_id))  # as the database says that was restored
    with pytest.raises(
        openai.BadRequestError, match=f"A part of the upload {upload_id} is missing in storage"
    ) as refused:
        client.uploads.complete(upload_id, part_ids=[part])
    assert refused.value.param == "part_ids"


def test_completing_again_or_at_the_same_moment_gives_one_file(client: openai.OpenAI) -> None:
    upload_id = begin(client)
    part_id = send(client, upload_id, DATA)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.uploads.complete(upload_id, part_ids=[part_id]), range(4)))
    answers.append(client.uploads.complete(upload_id, part_ids=[part_id]))
    assert len({answer.file.id for answer in answers if answer.file}) == 1
    assert all(answer.status == "completed" for answer in answers)


def test_a_cancelled_upload_takes_no_more(client: openai.OpenAI, settings: Settings) -> None:
    upload_id = begin(client)
    part_id = send(client, upload_id, DATA)
    assert client.uploads.cancel(upload_id).status == "cancelled"
    assert client.uploads.cancel(upload_id).status == "cancelled"
    assert parts_of(settings, upload_id) == []
    for wish in (
        lambda: send(client, upload_id, DATA),
        lambda: client.uploads.complete(upload_id, part_ids=[part_id]),
    ):
        with pytest.raises(openai.BadRequestError, match="is cancelled and cannot be"):
            wish()


def test_an_upload_expires_after_an_hour_of_the_databases_clock(client: openai.OpenAI, settings: Settings) -> None:
    upload_id = begin(client)
    part_id = send(client, upload_id, DATA)
    with psycopg.connect(settings.database_url) as connection:
        lasts = connection.execute("SELECT expires_at - created_at FROM uploads WHERE id = %s", [upload_id])
        assert lasts.fetchone() == (PENDING_FOR,)
        connection.execute("UPDATE uploads SET expires_at = now() WHERE id = %s", [upload_id])
    with pytest.raises(openai.BadRequestError, match="is expired"):
        client.uploads.complete(upload_id, part_ids=[part_id])
    with pytest.raises(openai.BadRequestError, match="is expired"):
        send(client, upload_id, DATA)


@pytest.fixture
def large_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the service check a file of a few KiB as it checks one of many GiB: in the background, in a separate
    process."""
    monkeypatch.setattr(row_check, "AT_ONCE_BYTES", 100)
    monkeypatch.setattr(row_check, "IN_PROCESS_BYTES", 100)


@pytest.mark.slow
@pytest.mark.usefixtures("large_is_small")
def test_a_large_file_is_answered_first_and_checked_then(client: openai.OpenAI) -> None:
    file = client.files.create(file=("large.jsonl", DATA), purpose="fine-tune")
    assert file.status == "uploaded"
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})
    assert job.status == "queued"
    client.fine_tuning.jobs.cancel(job.id)
    checked = client.files.wait_for_processing(file.id, poll_interval=0.1)
    assert checked.status == "processed"
    assert checked.model_extra["x_raydpo"]["report"]["num_rows"] == 40  # type: ignore[index]
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})
    client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.slow
@pytest.mark.usefixtures("large_is_small")
def test_a_large_file_with_a_bad_row_ends_in_error_with_its_line(client: openai.OpenAI) -> None:
    data = pair(1) + b"\n[]\n" + DATA
    file = client.files.create(file=("large.jsonl", data), purpose="fine-tune")
    checked = client.files.wait_for_processing(file.id, poll_interval=0.1)
    assert checked.status == "error"
    assert "Line 2 is not a dictionary" in str(checked.status_details)
    with pytest.raises(openai.BadRequestError, match="Line 2 is not a dictionary"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})


@pytest.mark.slow
def test_a_check_whose_control_plane_died_is_done_by_another(client: openai.OpenAI, settings: Settings) -> None:
    file, other = (client.files.create(file=("pairs.jsonl", DATA), purpose="fine-tune") for _ in range(2))
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        dead = "INSERT INTO leases VALUES (%s, 'the dead', now() + interval '1 hour')"
        connection.execute(dead, [f"check of {file.id}"])
        connection.execute("UPDATE files SET report = NULL WHERE id IN (%s, %s)", [file.id, other.id])
        assert client.files.wait_for_processing(other.id, poll_interval=0.1).status == "processed"
        assert client.files.retrieve(file.id).status == "uploaded"
        connection.execute("UPDATE leases SET expires_at = now() WHERE name = %s", [f"check of {file.id}"])
    assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"


@pytest.mark.slow
def test_a_file_that_cannot_be_checked_keeps_no_other_waiting_and_is_given_up(
    client: openai.OpenAI, settings: Settings
) -> None:
    lost, other = (client.files.create(file=("pairs.jsonl", DATA), purpose="fine-tune") for _ in range(2))
    storage.delete(storage.join(settings.storage_url, "files", lost.id))
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        connection.execute("UPDATE files SET report = NULL WHERE id IN (%s, %s)", [lost.id, other.id])
        assert client.files.wait_for_processing(other.id, poll_interval=0.1).status == "processed"
        assert client.files.retrieve(lost.id).status == "uploaded"
        connection.execute("UPDATE files SET created_at = now() - interval '25 hours' WHERE id = %s", [lost.id])
    assert client.files.wait_for_processing(lost.id, poll_interval=0.1).status == "error"

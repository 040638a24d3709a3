"""Tests /v1/files with OpenAI's unmodified client."""

import errno
import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import psycopg
import pytest

from services import storage
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pair, pairs, stored


def test_a_broken_line_is_refused_by_its_number_and_what_is_wrong(client: openai.OpenAI) -> None:
    lines = [pair(number) for number in range(12)]
    lines[6] = b'{"input": {"messages": []}'
    with pytest.raises(openai.BadRequestError, match="Line 7") as refused:
        client.files.create(file=("pairs.jsonl", b"\n".join(lines)), purpose="fine-tune")
    assert refused.value.param == "file"
    lines[6] = pair(6).replace(b"preferred_output", b"preferred", 1)
    with pytest.raises(openai.BadRequestError, match=r"Line 7.*preferred"):
        client.files.create(file=("pairs.jsonl", b"\n".join(lines)), purpose="fine-tune")


def with_bad_rows(good: int, bad: int) -> bytes:
    return b"\n".join([pair(number) for number in range(good)] + [b'{"input": 7}'] * bad)


def test_rows_that_cannot_be_used_are_left_out_where_whoever_sends_them_says_so(client: openai.OpenAI) -> None:
    rows = with_bad_rows(19, 1)
    with pytest.raises(openai.BadRequestError, match="Line 20"):
        client.files.create(file=("pairs.jsonl", rows), purpose="fine-tune")
    drop = {"x_raydpo": {"invalid_rows": "drop", "max_invalid_share": 0.05}}
    stored = client.files.create(file=("pairs.jsonl", rows), purpose="fine-tune", extra_body=drop)
    told: Any = stored.model_dump()["x_raydpo"]
    assert (told["invalid_rows"], told["max_invalid_share"], told["columns"]) == ("drop", 0.05, None)
    assert [problem["rows"]["lines"] for problem in told["report"]["problems"]] == [[20]]
    job = client.fine_tuning.jobs.create(model="tiny", training_file=stored.id, method={"type": "dpo"})
    told = job.model_dump()["x_raydpo"]
    assert (told["invalid_rows"], told["max_invalid_share"]) == ("drop", 0.05)
    client.fine_tuning.jobs.cancel(job.id)


def test_more_of_them_than_the_share_refuse_the_file(client: openai.OpenAI) -> None:
    words = (
        r"Line 20: the field /input .* In all, "
        r"2 rows cannot be used \(at most 5.00% of 21 may be left out\): 2 with wrong_type"
    )
    drop = {"x_raydpo": {"invalid_rows": "drop", "max_invalid_share": 0.05}}
    with pytest.raises(openai.BadRequestError, match=words):
        client.files.create(file=("pairs.jsonl", with_bad_rows(19, 2)), purpose="fine-tune", extra_body=drop)


def test_a_damaged_container_is_refused_whatever_share_may_be_left_out(client: openai.OpenAI) -> None:
    damaged = gzip.compress(pairs(2000))[:-400]
    drop = {"x_raydpo": {"invalid_rows": "drop", "max_invalid_share": 0.5}}
    with pytest.raises(openai.BadRequestError, match=r"Truncated compressed stream\); write the file again\.'?$"):
        client.files.create(file=("pairs.jsonl.gz", damaged), purpose="fine-tune", extra_body=drop)


def test_columns_of_any_name_are_read_by_their_roles(client: openai.OpenAI) -> None:
    rows = b"\n".join(json.dumps({"ask": f"{i}?", "good": "Yes.", "bad": "No."}).encode() for i in range(12))
    with pytest.raises(openai.BadRequestError, match=r"the row has columns \(ask, bad, good\)"):
        client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    roles = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    named = {"x_raydpo": {"columns": roles}}
    stored = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune", extra_body=named)
    told: Any = stored.model_dump()["x_raydpo"]
    assert (told["columns"], told["report"]["kind"]) == (roles, "pairs")
    made = client.uploads.create(
        bytes=len(rows), filename="rows.jsonl", mime_type="text/plain", purpose="fine-tune", extra_body=named
    )
    part = client.uploads.parts.create(made.id, data=rows)
    joined = client.uploads.complete(made.id, part_ids=[part.id]).file
    assert joined is not None
    told = joined.model_dump()["x_raydpo"]
    assert (told["columns"], told["report"]["kind"]) == (roles, "pairs")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=joined.id, method={"type": "dpo"})
    assert job.model_dump()["x_raydpo"]["columns"] == roles
    client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize(
    ("extension", "param"),
    [
        ({"columns": {"answer": "x"}}, "x_raydpo.columns.answer"),
        ({"invalid_rows": "ignore"}, "x_raydpo.invalid_rows"),
        ({"max_invalid_share": 0.1}, "x_raydpo.max_invalid_share"),
        ({"dataset": "file:///x"}, "x_raydpo.dataset"),
    ],
)
def test_how_rows_are_read_is_refused_by_name(client: openai.OpenAI, extension: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a.jsonl", pairs()), purpose="fine-tune", extra_body={"x_raydpo": extension})
    assert refused.value.param == param


def test_other_purposes_are_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose 'batch'") as refused:
        client.files.create(file=("a.jsonl", pairs()), purpose="batch")
    assert refused.value.code == "unsupported_value"


def test_a_file_that_a_live_job_needs_stays(client: openai.OpenAI) -> None:
    files = [client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id for _ in range(2)]
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=files[0], validation_file=files[1], method={"type": "dpo"}
    )
    for file_id in files:
        with pytest.raises(openai.BadRequestError, match=job.id):
            client.files.delete(file_id)
    client.fine_tuning.jobs.cancel(job.id)
    assert all(client.files.delete(file_id).deleted for file_id in files)


TEXTS = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
HOSTILE = {
    "broken UTF-8": (b'{"prompt": "\xff"}', "Line 2 is not UTF-8"),
    "NUL": (b'{"prompt": "a\\u0000b"}', "Line 2: the field /prompt contains a NUL"),
    "half a surrogate pair": (b'{"prompt": "\\ud83d"}', "Line 2: the field /prompt contains half of a surrogate pair"),
    "nesting": (b'{"prompt": ' + b"[" * 10**5, "Line 2 nests lists and objects more than 64 levels"),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', "Line 2: the field /prompt is given twice"),
    "infinity": (b'{"prompt": Infinity}', "Line 2: the field /prompt is Infinity, which is not a number in JSON"),
    "a long line": (b"x" * (33 * 2**20), "Line 2 is longer than 32 MiB"),
    "a long key": (b'{"' + b"k" * 10**6 + b'": 1}', r"Line 2: the row has columns \(kkk"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_row_is_refused_by_line_in_a_short_message(client: openai.OpenAI, name: str) -> None:
    row, says = HOSTILE[name]
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        client.files.create(file=("hostile.jsonl", TEXTS + row), purpose="fine-tune")
    assert refused.value.param == "file"
    assert len(refused.value.message) < 1500


def test_every_kind_of_problem_is_counted_in_a_short_message(client: openai.OpenAI) -> None:
    rows = b"\n".join(row for row, _ in HOSTILE.values())
    with pytest.raises(
        openai.BadRequestError, match=r"Line 2 is not UTF-8.* rows cannot be used: 1 with invalid_utf8"
    ) as refused:
        client.files.create(file=("hostile.jsonl", TEXTS + rows), purpose="fine-tune")
    assert len(refused.value.message) < 2000


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_refused(client: openai.OpenAI, content: bytes) -> None:
    with pytest.raises(openai.BadRequestError, match="has no rows"):
        client.files.create(file=("empty.jsonl", content), purpose="fine-tune")


def test_harmless_oddities_are_taken_and_reported(client: openai.OpenAI) -> None:
    same = TEXTS.replace(b'"c"', b'"b"').strip() + b"\r\n"
    stored = client.files.create(file=("odd.jsonl", b"\xef\xbb\xbf" + same), purpose="fine-tune")
    report = stored.model_extra["x_raydpo"]["report"]  # type: ignore[index]
    assert (report["num_rows"], report["num_identical"], report["problems"]) == (1, 1, [])


# --- a life that ends -------------------------------------------------------------------------

AN_HOUR: Any = {"anchor": "created_at", "seconds": 3600}


def end_life_of(file_id: str, settings: Settings) -> None:
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("UPDATE files SET expires_at = now() WHERE id = %s", [file_id])


def test_an_expired_file_is_gone_at_once(client: openai.OpenAI, settings: Settings) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune", expires_after=AN_HOUR)
    assert file.expires_at == file.created_at + 3600
    assert client.files.retrieve(file.id).expires_at == file.expires_at
    end_life_of(file.id, settings)
    assert file.id not in [file.id for file in client.files.list()]
    for wish in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=file.id):
            wish(file.id)
    with pytest.raises(openai.BadRequestError, match="after"):
        client.files.list(after=file.id)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"anchor": "created_at", "seconds": 3599}, "expires_after.seconds"),
        ({"anchor": "created_at", "seconds": 2_592_001}, "expires_after.seconds"),
        ({"anchor": "created_at", "seconds": "soon"}, "expires_after.seconds"),
        ({"anchor": "last_active_at", "seconds": 3600}, "expires_after.anchor"),
        ({"seconds": 3600}, "expires_after.anchor"),
    ],
)
def test_a_life_out_of_bounds_is_refused_by_name(client: openai.OpenAI, given: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune", expires_after=given)
    assert refused.value.param == param


# --- how much a project may have ---------------------------------------------------------------


def test_a_project_has_no_more_bytes_than_it_may(client: openai.OpenAI, settings: Settings) -> None:
    def used() -> int:
        return sum(file.bytes for file in client.files.list())

    def set_limit(limit: int | None) -> None:
        with psycopg.connect(settings.database_url) as connection:
            connection.execute("UPDATE projects SET max_bytes = %s WHERE id = 'proj_default'", [limit])

    set_limit(used() + 2 * len(pairs()))
    try:
        upload = client.uploads.create(
            filename="a.jsonl", purpose="fine-tune", bytes=len(pairs()), mime_type="application/jsonl"
        )
        kept = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
        with pytest.raises(openai.RateLimitError, match=f"{len(pairs())} more do not fit.*delete files") as refused:
            client.with_options(max_retries=2).files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
        assert (refused.value.code, refused.value.type) == ("exceeded_quota", "insufficient_quota")
        with pytest.raises(openai.RateLimitError):
            client.uploads.create(filename="a", purpose="fine-tune", bytes=1, mime_type="text/plain")
        part = client.uploads.parts.create(upload.id, data=pairs())  # its place was kept
        assert client.uploads.complete(upload.id, part_ids=[part.id]).status == "completed"
        client.files.delete(kept.id)
        with ThreadPoolExecutor(4) as pool:
            tried = [pool.submit(client.files.create, file=("a", pairs()), purpose="fine-tune") for _ in range(4)]
        assert sum(attempt.exception() is None for attempt in tried) == 1
    finally:
        set_limit(None)


def test_a_full_disk_is_said_and_nothing_is_left(
    client: openai.OpenAI, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(uri: str, source: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = stored(settings, "files")
    monkeypatch.setattr(storage, "write_stream", full)
    with pytest.raises(openai.InternalServerError, match="storage is full") as refused:
        client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    assert (refused.value.status_code, refused.value.code) == (503, "storage_full")
    assert refused.value.response.headers["retry-after"] == "30"
    assert stored(settings, "files") == before

"""Tests the routes of files."""

import httpx
import openai
import psycopg
import pytest

from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, pairs

KEY = {"Authorization": f"Bearer {API_KEY}"}


def test_an_upload_is_processed_listed_read_back_and_deleted(client: openai.OpenAI) -> None:
    created = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    assert client.files.wait_for_processing(created.id).status == "processed"
    assert created.bytes == len(pairs())
    assert created.id in [file.id for file in client.files.list(limit=2)]
    assert client.files.content(created.id).read() == pairs()
    assert client.files.delete(created.id).deleted
    with pytest.raises(openai.NotFoundError, match=created.id):
        client.files.retrieve(created.id)


def test_pages_follow_each_other_in_both_orders_without_repeating(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{i}.jsonl", pairs()), purpose="fine-tune").id for i in range(5)]
    ours = [file.id for file in client.files.list(limit=2, order="asc") if file.id in made]
    assert ours == made
    assert [file.id for file in client.files.list(limit=2, order="desc") if file.id in made] == made[::-1]


def test_a_cursor_that_names_nothing_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(after="file-none")
    assert refused.value.param == "after"


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("bytes=0-9", 0, 10), ("bytes=10-", 10, None), ("bytes=-7", -7, None), ("bytes=5-99999999", 5, None)],
)
def test_a_range_is_answered_with_its_bytes(
    base_url: str, client: openai.OpenAI, asked: str, start: int, stop: int | None
) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    url = f"{base_url}/v1/files/{file.id}/content"
    whole = httpx.get(url, headers=KEY)
    assert whole.headers["accept-ranges"] == "bytes"
    part = httpx.get(url, headers={**KEY, "Range": asked})
    assert part.status_code == 206
    assert part.content == pairs()[start:stop]
    first = start % len(pairs())
    assert part.headers["content-range"] == f"bytes {first}-{first + len(part.content) - 1}/{len(pairs())}"


def test_a_range_behind_the_end_is_refused_and_one_of_many_parts_ignored(base_url: str, client: openai.OpenAI) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    url = f"{base_url}/v1/files/{file.id}/content"
    for asked in (f"bytes={len(pairs())}-", "bytes=-0"):
        answer = httpx.get(url, headers={**KEY, "Range": asked})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(pairs())}")
        assert answer.json()["error"]["param"] == "Range"
    for asked in ("bytes=0-1,5-6", "bytes=-", "rows=0-1"):
        assert httpx.get(url, headers={**KEY, "Range": asked}).content == pairs()


def test_files_of_the_same_moment_are_listed_once(client: openai.OpenAI, settings: Settings) -> None:
    made = {client.files.create(file=(f"{i}.jsonl", pairs()), purpose="fine-tune").id for i in range(5)}
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("UPDATE files SET created_at = date_trunc('day', created_at)")
    for order in ("asc", "desc"):
        listed = [file.id for file in client.files.list(limit=2, order=order)]  # type: ignore[arg-type]
        assert len(listed) == len(set(listed))
        assert made <= set(listed)


def test_a_cursor_that_was_deleted_is_refused(client: openai.OpenAI) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    client.files.delete(file.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(after=file.id)
    assert refused.value.param == "after"

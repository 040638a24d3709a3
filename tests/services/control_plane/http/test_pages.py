"""Tests lists that are read page by page while items are added: none is repeated or left out, and no list is
endless."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import openai
import pytest

from tests.services.control_plane.conftest import pairs

MOST = 500  # a list that never ends shows more


def read_while(write: Callable[[], object], pages: Iterable[Any]) -> list[str]:
    """Calls `write` again and again in a thread, and returns the ids of the items on all pages."""
    done = threading.Event()

    def go_on() -> None:
        while not done.is_set():
            write()

    writer = threading.Thread(target=go_on)
    writer.start()
    try:
        seen: list[str] = []
        for row in pages:
            seen.append(row.id)
            assert len(seen) < MOST
    finally:
        done.set()
        writer.join()
    return seen


def check(seen: list[str], there: list[str]) -> None:
    """Asserts that no id was seen twice, and that `there`, the items before the first page, were all seen in order."""
    assert len(set(seen)) == len(seen)
    assert [name for name in seen if name in there] == there


@pytest.fixture(scope="module")
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id


def new_job(client: openai.OpenAI, file_id: str) -> str:
    return client.fine_tuning.jobs.create(model="tiny", training_file=file_id, method={"type": "dpo"}).id


def test_files(client: openai.OpenAI) -> None:
    def write() -> str:
        return client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id

    there = [write() for _ in range(9)]
    check(read_while(write, client.files.list(limit=2)), there[::-1])


def test_jobs(client: openai.OpenAI, file_id: str) -> None:
    there = [new_job(client, file_id) for _ in range(9)]
    seen = read_while(lambda: new_job(client, file_id), client.fine_tuning.jobs.list(limit=2))
    check(seen, there[::-1])


def test_events(client: openai.OpenAI, file_id: str) -> None:
    job_id = new_job(client, file_id)

    def write() -> None:
        client.fine_tuning.jobs.pause(job_id)
        client.fine_tuning.jobs.resume(job_id)

    for _ in range(3):
        write()
    there = [event.id for event in client.fine_tuning.jobs.list_events(job_id)]
    assert len(there) >= 15  # more if the service looked at the job meanwhile, and told what it waits for
    check(read_while(write, client.fine_tuning.jobs.list_events(job_id, limit=2)), there)

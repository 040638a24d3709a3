"""Tests the reading of stored logs page by page."""

from typing import Any

import httpx
import openai
import pytest

from services import storage
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, pairs


@pytest.fixture(scope="module")
def job_id(client: openai.OpenAI) -> str:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"}).id


@pytest.fixture
def read(base_url: str, job_id: str) -> Any:
    def read(**params: Any) -> Any:
        url, headers = f"{base_url}/v1/x/jobs/{job_id}/logs", {"Authorization": f"Bearer {API_KEY}"}
        return httpx.get(url, params=params, headers=headers).json()

    return read


def keep(settings: Settings, job_id: str, attempt: int, source: str, first: int, text: str) -> None:
    """Stores a part of a log as services.training.reports.logs does."""
    uri = storage.join(settings.storage_url, "runs", job_id, "logs", str(attempt), source, f"{first:012d}.log")
    storage.write_bytes(uri, text.encode())


def test_logs_are_read_page_by_page_and_go_on_where_the_last_page_ended(
    settings: Settings, job_id: str, read: Any
) -> None:
    nothing = read()
    assert (nothing["data"], nothing["attempts"], nothing["next"], nothing["has_more"]) == ([], [], 0, False)
    keep(settings, job_id, 1, "driver", 0, "one\ntwo\n")
    keep(settings, job_id, 1, "driver", 8, "three ⟦\n")
    first = read(limit=2)
    assert (first["data"], first["next"], first["has_more"]) == (["one", "two"], 8, True)
    rest = read(after=8)
    assert (rest["data"], rest["next"], rest["has_more"]) == (["three ⟦"], 18, False)
    assert read(after=18)["data"] == []
    keep(settings, job_id, 1, "driver", 8, "three ⟦\nfour\n")  # the last segment grows
    assert read(after=18) | {"data": 0} == rest | {"data": 0, "next": 23}
    assert read(after=18)["data"] == ["four"]
    assert read(after=4)["data"] == ["two", "three ⟦", "four"]


def test_the_newest_attempt_and_the_driver_are_shown_unless_others_are_named(
    settings: Settings, job_id: str, read: Any
) -> None:
    keep(settings, job_id, 1, "driver", 0, "one\n")
    keep(settings, job_id, 2, "driver", 0, "resumed\n")
    keep(settings, job_id, 2, "worker-0", 0, "step\n")
    page = read()
    assert page == {
        "object": "job.logs",
        "attempt": 2,
        "attempts": [1, 2],
        "source": "driver",
        "sources": ["driver", "worker-0"],
        "data": ["resumed"],
        "next": 8,
        "has_more": False,
    }
    assert read(source="worker-0")["data"] == ["step"]
    assert read(attempt=1)["data"][0] == "one"
    refused = {
        "source": read(source="../../../../files")["error"],
        "attempt": read(attempt=3)["error"],
        "limit": read(limit=0)["error"],
    }
    for param, error in refused.items():
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert refused["attempt"]["message"] == (
        "The query parameter 'attempt' is 3, but the job has logs only of the attempts [1, 2]; "
        "choose one of these attempts."
    )
    later = read(source="worker-1")
    assert (later["data"], later["sources"]) == ([], ["driver", "worker-0"]), "it may not have printed yet"


def test_what_a_long_log_lost_is_said_where_it_stood(settings: Settings, job_id: str, read: Any) -> None:
    keep(settings, job_id, 3, "driver", 0, "first\n")
    keep(settings, job_id, 3, "driver", 1000, "last\n")
    page = read(attempt=3)
    assert page["data"] == ["first", "... 994 bytes were left out, because the log is too long ...", "last"]
    assert read(attempt=3, after=6)["data"] == page["data"][1:]
    assert read(attempt=3, after=500)["data"][1:] == ["last"]
    assert read(attempt=3, limit=2)["next"] == 1000


def test_a_page_is_bounded_by_bytes_too(settings: Settings, job_id: str, read: Any) -> None:
    keep(settings, job_id, 4, "driver", 0, ("x" * 65_535 + "\n") * 32)
    page = read(attempt=4, limit=10_000)
    assert page["has_more"]
    assert 2**20 < page["next"] < 2**20 + 2 * 65_536


def test_there_are_no_logs_of_a_job_that_does_not_exist(base_url: str) -> None:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    assert httpx.get(f"{base_url}/v1/x/jobs/ftjob-1/logs", headers=headers).status_code == 404
    assert httpx.get(f"{base_url}/v1/x/jobs/ftjob-1/logs").status_code == 401

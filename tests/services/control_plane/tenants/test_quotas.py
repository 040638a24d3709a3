"""Tests the limits of what a project may use."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psycopg
import pytest

from services.control_plane.attempts import attempts
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Attempt
from services.control_plane.settings import Settings
from services.control_plane.tenants import quotas
from tests.services.control_plane.conftest import EVERY_SCOPE, api_of, new_key, new_project, pairs


@pytest.fixture(scope="module")
def team(api: httpx.Client, base_url: str) -> Any:
    project = new_project(api, "team")
    with api_of(base_url, new_key(api, project_id=project, scopes=EVERY_SCOPE)["value"]) as own:
        upload = own.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"})
        yield project, own, upload.json()


def submit(own: httpx.Client, file_id: str) -> httpx.Response:
    body = {"model": "tiny", "training_file": file_id, "method": {"type": "dpo"}}
    return own.post("/fine_tuning/jobs", json=body)


@pytest.mark.slow
def test_jobs_beyond_the_queue_are_refused_for_good_however_many_come_at_once(api: httpx.Client, team: Any) -> None:
    project, own, file = team
    api.post(f"/x/projects/{project}", json={"max_queued_jobs": 2})
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(submit(own, file["id"]))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert (refused.json()["error"]["type"], refused.headers["x-should-retry"]) == ("insufficient_quota", "false")
    assert "2 queued and paused jobs, and the limit is 2; wait for a job to start, cancel one" in refused.text

    usage = api.get(f"/x/projects/{project}/usage").json()
    assert usage == own.get(f"/x/projects/{project}/usage").json()
    assert usage["jobs"]["queued"] == 2
    assert usage["limits"]["max_queued_jobs"] == {"used": 2, "limit": 2}
    assert usage["limits"]["max_bytes"] == {"used": file["bytes"], "limit": None}

    refused = api.post(f"/x/projects/{project}/archive")
    assert "2 jobs that have not ended; cancel these jobs first" in refused.text
    for job in own.get("/fine_tuning/jobs").json()["data"]:
        own.post(f"/fine_tuning/jobs/{job['id']}/cancel")
    assert submit(own, file["id"]).status_code == 200


@pytest.mark.slow
def test_paused_jobs_count_and_resuming_asks_the_quota(api: httpx.Client, team: Any, settings: Settings) -> None:
    project, own, file = team
    for each in own.get("/fine_tuning/jobs").json()["data"]:
        if each["finished_at"] is None:
            own.post(f"/fine_tuning/jobs/{each['id']}/cancel")
    api.post(f"/x/projects/{project}", json={"max_queued_jobs": 1})
    paused = submit(own, file["id"]).json()["id"]
    assert own.post(f"/fine_tuning/jobs/{paused}/pause").json()["status"] == "paused"
    refused = submit(own, file["id"])
    assert refused.status_code == 429
    assert "1 queued and paused jobs, and the limit is 1" in refused.text
    assert own.get(f"/x/projects/{project}/usage").json()["limits"]["max_queued_jobs"] == {"used": 1, "limit": 1}
    assert own.post(f"/fine_tuning/jobs/{paused}/resume").json()["status"] == "queued"
    with psycopg.connect(settings.database_url, autocommit=True) as connection:  # it runs, and another one is queued
        connection.execute("UPDATE jobs SET observed = 'running' WHERE id = %s", [paused])
        queued = submit(own, file["id"]).json()["id"]
        connection.execute("UPDATE jobs SET observed = 'paused', desired = 'pause' WHERE id = %s", [paused])
    refused = own.post(f"/fine_tuning/jobs/{paused}/resume")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "exceeded_quota")
    assert "1 queued jobs, and the limit is 1" in refused.text
    own.post(f"/fine_tuning/jobs/{queued}/cancel")
    assert own.post(f"/fine_tuning/jobs/{paused}/resume").status_code == 200
    own.post(f"/fine_tuning/jobs/{paused}/cancel")


@pytest.mark.slow
def test_of_many_that_resume_at_once_the_quota_lets_as_many_be_queued(api: httpx.Client, team: Any) -> None:
    project, own, file = team
    api.post(f"/x/projects/{project}", json={"max_queued_jobs": None})
    paused = [submit(own, file["id"]).json()["id"] for _ in range(6)]
    for job in paused:
        own.post(f"/fine_tuning/jobs/{job}/pause")
    api.post(f"/x/projects/{project}", json={"max_queued_jobs": 2})
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda job: own.post(f"/fine_tuning/jobs/{job}/resume").status_code, paused))
    assert sorted(answers) == [200, 200, 429, 429, 429, 429]
    for job in paused:
        own.post(f"/fine_tuning/jobs/{job}/cancel")


def test_accelerator_hours_are_counted_and_no_job_is_taken_beyond_them(
    api: httpx.Client, team: Any, settings: Settings
) -> None:
    project, own, file = team
    api.post(f"/x/projects/{project}", json={"max_queued_jobs": None, "max_accelerator_hours": 2.5})
    job = submit(own, file["id"]).json()
    with psycopg.connect(settings.database_url) as connection:
        connection.execute(
            "INSERT INTO attempts (job_id, number, state, token, next_seq, num_accelerators, failed,"
            " created_at)"
            " VALUES (%s, 1, 'running', '', 0, 4, false, now() - interval '30 minutes')",
            [job["id"]],
        )

    async def end() -> None:
        store = Store(settings.database_url)
        async with store.begin() as session:
            attempt = await session.get_one(Attempt, (job["id"], 1))
            assert [await attempts.end(session, attempt, "succeeded") for _ in range(2)] == [True, False]
        await store.close()

    def used() -> float:
        counted = own.get(f"/x/projects/{project}/usage").json()["limits"]["max_accelerator_hours"]
        assert counted["limit"] == 2.5
        return round(float(counted["used"]), 2)

    assert used() == 2
    asyncio.run(end())
    assert used() == 2  # counted once, also if its end is reported twice
    assert submit(own, file["id"]).status_code == 200
    api.post(f"/x/projects/{project}", json={"max_accelerator_hours": 2})
    refused = submit(own, file["id"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "exceeded_quota")
    assert "has used 2.00 of at most 2 accelerator hours; ask an admin" in refused.text


@pytest.mark.parametrize("limits", [{}, {"max_queued_jobs": 9}])
def test_a_project_is_not_archived_while_a_job_of_it_is_being_stored(
    api: httpx.Client, settings: Settings, limits: dict[str, int]
) -> None:
    project = api.post("/x/projects", json={"name": f"busy {limits}", **limits}).json()["id"]

    async def run() -> None:
        store = Store(settings.database_url)
        async with store.begin_for(project) as session:
            await quotas.admit_job(session)
            with psycopg.connect(settings.database_url) as other, pytest.raises(psycopg.errors.LockNotAvailable):
                other.execute("SELECT FROM projects WHERE id = %s FOR NO KEY UPDATE NOWAIT", [project])
        await store.close()

    asyncio.run(run())
    assert api.post(f"/x/projects/{project}/archive").status_code == 200

"""Tests side jobs by checks of files, with a stand-in for Ray, whose jobs the tests end."""

import asyncio
import shlex
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import psycopg
import pytest

from services import storage
from services.contract import CheckRequest, Failed, SideJobResult
from services.control_plane import side_jobs
from services.control_plane.cleanup import Sweeper
from services.control_plane.core.store import Store
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, FakeRay, api_of, new_key, new_project, pair, pairs, wait_for

REPORT = {"tokens": {"num_kept": 12}, "preview": []}
DONE = SideJobResult(finished_at=0, report=REPORT)


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay) -> Settings:
    ray_url = f"http://127.0.0.1:{fake_ray.server.server_port}"
    return offline.model_copy(update={"ray_url": ray_url, "max_running_checks": 3})


def sql(settings: Settings, statement: str) -> list[Any]:
    with psycopg.connect(settings.database_url) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def ray(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch, base_url: str, settings: Settings) -> Iterator[FakeRay]:
    """Returns a stand-in for Ray whose jobs run until a test ends them. Requests wait only for a moment."""
    monkeypatch.setattr(side_jobs, "WAIT_SECONDS", 0.3)
    monkeypatch.setattr(side_jobs, "POLL_SECONDS", 0.02)
    sql(settings, "DELETE FROM checks")
    fake_ray.jobs.clear()
    fake_ray.submissions.clear()
    yield fake_ray
    fake_ray.lose_answers = fake_ray.down = False


@pytest.fixture
def file_id(client: openai.OpenAI) -> str:
    """Uploads a file that no test has checked before, and returns its id."""
    content = pairs() + pair(time.time_ns())
    return client.files.create(file=("pairs.jsonl", content), purpose="fine-tune").id


@pytest.fixture
def ask(base_url: str, file_id: str) -> Callable[..., httpx.Response]:
    def ask(**body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {API_KEY}"}
        body = {"training_file": file_id} | body
        return httpx.post(f"{base_url}/v1/x/datasets/check", json=body, headers=headers, timeout=30)

    return ask


def request_of(ray: FakeRay, submission: int = -1) -> CheckRequest:
    uri = shlex.split(ray.submissions[submission]["entrypoint"])[-1]
    return CheckRequest.model_validate_json(storage.read_bytes(uri))


def finish(ray: FakeRay, result: SideJobResult | None, submission: int = -1) -> None:
    """Ends the job with this result, or as failed if the result is None."""
    if result:
        uri = storage.join(request_of(ray, submission).folder_uri, "report.json")
        storage.write_bytes(uri, result.model_dump_json().encode())
    ray.jobs[ray.submissions[submission]["submission_id"]] = "SUCCEEDED" if result else "FAILED"


@contextmanager
def ended_meanwhile(ray: FakeRay, result: SideJobResult | None) -> Iterator[None]:
    """Ends the job that is submitted in the block with this result, as soon as it is submitted."""

    def end_it() -> None:
        while not ray.submissions:
            time.sleep(0.01)
        finish(ray, result)

    worker = threading.Thread(target=end_it)
    worker.start()
    yield
    worker.join()


def test_with_a_model_one_job_runs_and_repeating_the_request_finds_its_result(ray: FakeRay, ask: Any) -> None:
    running = ask(model="tiny", max_length=64, truncation="keep_end").json()
    assert (running["status"], running["error"]) == ("running", None)
    again = ask(model="tiny", max_length=64, truncation="keep_end").json()
    assert again == running
    (submission,) = ray.submissions
    words = ["exec", "python", "-m", "services.forkserver.client", "--wait", "-m", "services.training.check_program"]
    assert shlex.split(submission["entrypoint"])[:-1] == words
    assert submission["submission_id"] == f"{running['id']}-1"
    recipe = request_of(ray).recipe
    assert (recipe.model_source, recipe.max_length, recipe.truncation) == ("/nowhere/tiny", 64, "keep_end")
    finish(ray, DONE)
    done = ask(model="tiny", max_length=64, truncation="keep_end").json()
    assert (done["id"], done["status"]) == (running["id"], "completed")
    assert done["report"] == {"survey": running["report"]["survey"], **REPORT}
    assert ask(model="tiny", max_length=63).json()["id"] != running["id"]
    assert len(ray.submissions) == 2


def test_a_request_waits_for_the_result(ray: FakeRay, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_jobs, "WAIT_SECONDS", 20)

    with ended_meanwhile(ray, DONE):
        assert ask(model="tiny").json()["status"] == "completed"


def test_requests_at_the_same_moment_start_one_job(ray: FakeRay, ask: Any) -> None:
    answers: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(model="tiny").json())) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer["status"] for answer in answers] == ["running"] * 5
    assert len(ray.submissions) == 1


def test_a_lost_answer_to_the_submission_is_no_failure(ray: FakeRay, ask: Any) -> None:
    ray.lose_answers = True
    assert ask(model="tiny").json()["status"] == "running"
    assert len(ray.submissions) == 1


def test_a_job_that_dies_is_told_and_tried_again_under_a_new_id(ray: FakeRay, ask: Any) -> None:
    check_id = ask(model="tiny").json()["id"]
    finish(ray, None)
    assert ask(model="tiny").json()["status"] == "running"
    assert [each["submission_id"] for each in ray.submissions] == [f"{check_id}-1", f"{check_id}-2"]
    finish(ray, DONE)
    assert ask(model="tiny").json()["status"] == "completed"


def test_jobs_that_ray_still_knows_and_nobody_else_are_passed_over(ray: FakeRay, ask: Any, settings: Settings) -> None:
    """Ray keeps the ids of jobs whose folders the service has removed after a week."""
    check_id = ask(model="tiny").json()["id"]
    ray.jobs |= {f"{check_id}-{attempt}": "SUCCEEDED" for attempt in (1, 2, 3)}
    assert ask(model="tiny").json()["status"] == "running"
    assert ray.submissions[-1]["submission_id"] == f"{check_id}-4"


def test_a_job_that_a_restarted_ray_has_lost_runs_again(ray: FakeRay, ask: Any, settings: Settings) -> None:
    check_id = ask(model="tiny").json()["id"]
    sql(settings, "UPDATE checks SET ended_at = now()")
    del ray.jobs[f"{check_id}-1"]
    assert ask(model="tiny").json()["status"] == "running"
    assert [each["submission_id"] for each in ray.submissions] == [f"{check_id}-1"] * 2
    assert sql(settings, "SELECT ended_at FROM checks") == [(None,)]


def test_a_job_that_dies_while_somebody_waits_is_a_failure(
    ray: FakeRay, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_jobs, "WAIT_SECONDS", 20)

    with ended_meanwhile(ray, None):
        answer = ask(model="tiny").json()
    assert (answer["status"], answer["error"]["code"]) == ("failed", "check_lost")
    assert f"{answer['id']}-1" in answer["error"]["message"]


def test_a_failure_is_told_and_tried_again_when_it_is_old(ray: FakeRay, ask: Any) -> None:
    ask(model="tiny")
    error = Failed(code="invalid_model", message="The tokenizer has no chat template.", param="model")
    finish(ray, SideJobResult(finished_at=time.time(), error=error))
    for _ in range(2):
        answer = ask(model="tiny").json()
        assert answer["status"] == "failed"
        assert answer["error"] == {"code": "invalid_model", "message": error.message, "param": "model"}
    finish(ray, SideJobResult(finished_at=time.time() - 100, error=error))
    assert ask(model="tiny").json()["status"] == "running"
    assert len(ray.submissions) == 2


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (
            (400, "ValueError: no such runtime_env"),
            "check_refused",
            ("The Ray cluster refuses to run the check: ValueError: no such"),
        ),
        ((500, "No available agent"), "cluster_unavailable", "Try again in"),
    ],
)
def test_a_check_that_ray_does_not_launch_is_not_told_to_be_running(
    ray: FakeRay, ask: Any, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str], code: str, words: str
) -> None:
    monkeypatch.setattr(ray, "post", lambda path, body: answer)
    found = ask(model="tiny")
    assert (found.status_code, found.json()["error"]["code"]) == (503, code)
    assert words in found.json()["error"]["message"]


def test_a_cluster_that_does_not_answer_is_unavailable(ray: FakeRay, ask: Any) -> None:
    ray.down = True
    answer = ask(model="tiny")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cluster_unavailable")
    assert int(answer.headers["retry-after"]) > 0


def test_of_one_project_a_few_checks_run_at_once(ray: FakeRay, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_jobs, "WAIT_SECONDS", 0.0)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda length: ask(model="tiny", max_length=length), range(100, 108)))
    assert Counter(answer.status_code for answer in answers) == {200: 3, 429: 5}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "The project runs 3 checks and merges, which is the limit (max_running_checks)" in refused.text
    assert int(refused.headers["retry-after"]) > 0
    assert len(ray.submissions) == 3
    finish(ray, DONE)
    assert ask(model="tiny", max_length=200).json()["status"] == "running"


def test_another_project_has_checks_of_its_own_and_sees_no_others(
    ray: FakeRay, ask: Any, api: httpx.Client, base_url: str
) -> None:
    first = ask(model="tiny").json()["id"]
    finish(ray, DONE)
    project = new_project(api, "another")
    with api_of(base_url, new_key(api, project_id=project)["value"]) as own:
        file_id = request_of(ray).recipe.training_uri.partition("?")[0].rpartition("/")[2]
        content = api.get(f"/files/{file_id}/content").content
        file = own.post("/files", files={"file": ("pairs.jsonl", content)}, data={"purpose": "fine-tune"}).json()
        for length in (None, 65, 66):
            body = {"training_file": file["id"], "model": "tiny"} | ({"max_length": length} if length else {})
            answer = own.post("/x/datasets/check", json=body).json()
            assert (answer["status"], answer["id"] == first) == ("running", False)


def test_a_check_that_runs_too_long_is_stopped_and_one_that_was_never_launched_is_forgotten(
    ray: FakeRay, ask: Any, settings: Settings
) -> None:
    late, never = (ask(model="tiny", max_length=length).json()["id"] + "-1" for length in (64, 65))
    del ray.jobs[never]
    sql(settings, f"UPDATE checks SET created_at = now() - interval '2 hours' WHERE submission_id <> '{never}'")
    sql(settings, f"UPDATE checks SET created_at = now() - interval '1 minute' WHERE submission_id = '{never}'")
    running = "SELECT submission_id FROM checks WHERE ended_at IS NULL"
    assert sweep(settings) == [late]
    assert ray.jobs[late] == "STOPPED"
    assert sweep(settings) == []
    assert sql(settings, running) == [(never,)]
    sql(settings, f"UPDATE checks SET created_at = now() - interval '3 minutes' WHERE submission_id = '{never}'")
    assert sweep(settings) == []
    assert sql(settings, running) == []


def test_a_late_check_that_ray_fails_to_stop_keeps_no_other_one_running(
    ray: FakeRay, ask: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, late = sorted(ask(model="tiny", max_length=length).json()["id"] + "-1" for length in (66, 67))
    sql(settings, "UPDATE checks SET created_at = now() - interval '2 hours'")
    stop = ray.post
    monkeypatch.setattr(ray, "post", lambda path, body: (500, "stuck") if stuck in path else stop(path, body))
    assert sweep(settings) == [late]
    sweep(settings)
    assert sql(settings, "SELECT submission_id FROM checks WHERE ended_at IS NULL") == [(stuck,)]


def test_what_a_check_left_is_removed_after_a_week(ray: FakeRay, ask: Any, settings: Settings) -> None:
    ask(model="tiny")
    finish(ray, DONE)
    folder = request_of(ray).folder_uri
    sweep(settings)
    assert storage.exists(storage.join(folder, "report.json"))
    sql(settings, "UPDATE checks SET ended_at = now() - interval '8 days'")
    sweep(settings)
    assert storage.list_files(folder) == []
    assert ask(model="tiny").json()["status"] == "running"


def sweep(settings: Settings) -> list[str]:
    """Removes old checks, and returns the ids of those that were stopped."""

    async def run() -> list[str]:
        store = Store(settings.database_url)
        ray_api = RayApi(settings, store.instance)
        stopped = await side_jobs.stop_late(store, ray_api)
        await Sweeper(store, ray_api, settings).sweep()
        await ray_api.close()
        await store.close()
        return stopped

    return asyncio.run(run())


@pytest.mark.slow
def test_who_hangs_up_ends_the_wait(ray: FakeRay, base_url: str, file_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_jobs, "WAIT_SECONDS", 3600)
    looks = [time.monotonic()]
    get = ray.get

    def look(path: str) -> tuple[int, Any]:
        if "/check-" in path:
            looks.append(time.monotonic())
        return get(path)

    monkeypatch.setattr(ray, "get", look)
    body, headers = {"training_file": file_id, "model": "tiny"}, {"authorization": f"Bearer {API_KEY}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{base_url}/v1/x/datasets/check", json=body, headers=headers, timeout=0.5)
    wait_for(lambda: time.monotonic() - looks[-1] > 4 * side_jobs.POLL_SECONDS)

"""Tests that no report, request or name stops the service: each ends in a message after few tries."""

import json
import shlex
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psycopg
import pytest
from sqlalchemy.exc import DataError, NoResultFound, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection

from services import storage
from services.contract import AttemptSpec, EventBatch, Message, Succeeded
from services.control_plane.attempts import attempts
from services.control_plane.attempts.step_retries import LONGEST_PAUSE_SECONDS, TRIES, Patience, in_words, is_ours
from services.control_plane.settings import Settings
from services.spool import segment_uri, write
from tests.services.control_plane.attempts.test_reconciler import reports, rest, spool, submit, ticks
from tests.services.control_plane.conftest import FakeRay

WORDS = "RuntimeEnv: field env_vars must be of type Dict[str, str]"


class Ray(FakeRay):
    """A stand-in for Ray that refuses launches with `refusal`, if it is set, and models if `takes_models` is false."""

    refusal: tuple[int, str] | None = None
    num_launches = 0
    page: str | None = None  # that something shows in its place

    takes_models = True
    num_puts = 0

    def get(self, path: str) -> tuple[int, Any]:
        self.down = False
        return (200, self.page) if self.page else super().get(path)

    def deploy(self, body: dict[str, Any]) -> None:
        self.num_puts += 1
        if self.takes_models:
            super().deploy(body)
        else:
            self.down = True  # for this answer

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path.endswith("/stop"):
            return super().post(path, body)
        self.num_launches += 1
        return self.refusal or super().post(path, body)


@pytest.fixture(scope="module")
def fake_ray() -> Iterator[Ray]:
    fake = Ray()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def ray(fake_ray: Ray) -> Ray:
    fake_ray.jobs.clear()
    fake_ray.submissions.clear()
    fake_ray.refusal, fake_ray.page, fake_ray.num_launches = None, None, 0
    fake_ray.takes_models, fake_ray.num_puts, fake_ray.down, fake_ray.serve = True, 0, False, {}
    return fake_ray


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: Ray) -> Settings:
    ray_url = f"http://127.0.0.1:{fake_ray.server.server_port}"
    return offline.model_copy(update={"ray_url": ray_url, "max_running_jobs": 1})


@pytest.fixture
def job_id(client: openai.OpenAI, settings: Settings, ray: Ray) -> Iterator[str]:
    yield submit(client, settings)
    ray.refusal = None
    live = [job.id for job in client.fine_tuning.jobs.list() if job.status in ("queued", "running")]
    for each in live:  # it would take the slot of the next test's
        client.fine_tuning.jobs.cancel(each)
    ticks(settings, 3 if live else 0)


def messages(client: openai.OpenAI, job_id: str) -> list[str]:
    """Returns the messages of the job's events, the newest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]


def post(ray: Ray, base_url: str, job_id: str, *written: str, token: bytes | None = None) -> httpx.Response:
    """Posts reports, each as JSON text, as the job's first attempt would, and returns the response.

    A text may contain its own `seq` and `created_at`.
    """
    own = ray.submissions[0]["runtime_env"]["env_vars"]["RAYDPO_ATTEMPT_TOKEN"].encode()
    events = ",".join(
        f'{{"seq": {seq}, "created_at": {time.time()}, "report": {report}}}' for seq, report in enumerate(written)
    )
    headers = {b"Authorization": b"Bearer " + (token or own), b"Content-Type": b"application/json"}
    url = f"{base_url}/internal/attempts/{job_id}/1/events"
    return httpx.post(url, content=f'{{"events": [{events}]}}'.encode(), headers=headers)


def succeed(client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str, *, first: int = 0) -> None:
    spool(settings, job_id, 1, reports(settings, job_id), first=first)
    ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"


def test_an_outcome_with_a_nul_ends_its_job_in_words_and_the_next_one_starts(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str, base_url: str
) -> None:
    ticks(settings, 1)
    other = submit(client, settings)
    outcome = json.dumps({"kind": "failed", "code": "invalid_training_file", "message": "list_view<a\0b> \ud800"})
    assert post(ray, base_url, job_id, outcome).status_code == 200
    ray.jobs[f"{job_id}-1"] = "FAILED"
    ticks(settings, 3)
    error = client.fine_tuning.jobs.retrieve(job_id).error
    assert error is not None
    assert (error.code, error.message) == ("invalid_training_file", "list_view<a\ufffdb> ?")
    succeed(client, settings, ray, other)


UNSTORABLE = {
    "a NUL in a name": '{"kind": "metrics", "step": 1, "total_steps": 3, "metrics": {"loss": 1, "\\u0000": 1}}',
    "no number": '{"kind": "metrics", "step": 1, "total_steps": 3, "metrics": {"loss": 1, "kl": NaN}}',
    "a number beyond all": '{"kind": "metrics", "step": 1, "total_steps": 3, "metrics": {"loss": 1, "kl": 1e999}}',
    "a step beyond integers": '{"kind": "metrics", "step": 4294967296, "total_steps": 3, "metrics": {"loss": 1}}',
    "a step without a loss": '{"kind": "metrics", "step": 1, "total_steps": 3, "metrics": {"kl": 1}}',
    "a kind of another release": '{"kind": "tea is ready", "cups": 2}',
}


@pytest.mark.parametrize("report", UNSTORABLE.values(), ids=UNSTORABLE)
def test_a_report_that_cannot_be_kept_is_told_and_those_around_it_are_kept(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str, base_url: str, report: str
) -> None:
    ticks(settings, 1)
    before, after = '{"kind": "message", "message": "before"}', '{"kind": "message", "message": "after"}'
    assert [post(ray, base_url, job_id, before, report, after).status_code for _ in range(2)] == [200, 200]
    told = sorted(messages(client, job_id)[:3], key=["after", "before"].__contains__)
    assert (set(told[1:]), "could not be stored" in told[0] or "cannot read" in told[0]) == ({"before", "after"}, True)
    assert all("VALUES" not in message for message in told), "no statement is shown"
    succeed(client, settings, ray, job_id, first=3)


def test_a_spooled_report_of_no_date_is_told_and_those_around_it_are_kept(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str
) -> None:
    ticks(settings, 1)
    *before, last = reports(settings, job_id)
    events = spool(settings, job_id, 1, [*before, Message(message="of no date"), last]).events
    events[len(before)] = events[len(before)].model_copy(update={"created_at": 1e20})
    uri = segment_uri(storage.join(settings.storage_url, "runs", job_id), 1, 0)
    write(uri, EventBatch(events=events).model_dump_json().encode())
    ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"
    assert any(
        f"Report {len(before)} (message) of attempt 1 could not be stored" in each for each in messages(client, job_id)
    )


def test_a_bearer_that_is_no_ascii_is_just_another_wrong_one(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str, base_url: str
) -> None:
    ticks(settings, 1)
    assert post(ray, base_url, job_id, token="schlüssel".encode("latin-1")).status_code == 409
    succeed(client, settings, ray, job_id)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/fine_tuning/jobs", r'{"model": "tiny", "training_file": "file-1", "method": {"type": "\ud800"}}'),
        ("/webhook_endpoints", r'{"name": "n", "url": "https://example.com", "event_types": ["\ud800"]}'),
    ],
)
def test_a_refusal_may_quote_what_is_no_text(api: httpx.Client, path: str, body: str) -> None:
    answer = api.post(path, content=body.encode(), headers={"content-type": "application/json"})
    assert (answer.status_code, "'?'" in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("status", [400, 403])
def test_launches_that_ray_refuses_are_few_and_end_the_job_in_rays_words(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str, status: int
) -> None:
    ray.refusal = (status, f"Traceback (most recent call last):\n  File ...\nValueError: {WORDS}\n")
    other = submit(client, settings)
    for each in (job_id, other):
        for _ in range(settings.max_attempts + 1):
            ticks(settings, 1)
            rest(settings, each, 3600)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.error is not None
    assert (job.status, WORDS in (job.error.message or "")) == ("failed", True)
    assert ray.num_launches <= 2 * settings.max_attempts
    said = [each for each in messages(client, job_id) if each.startswith("Attempt ")]
    assert said[-1].startswith(f"Attempt 1 of the job ended: Ray refuses to start the attempt: ValueError: {WORDS}")
    ray.refusal = None
    assert client.fine_tuning.jobs.retrieve(other).status == "failed"


def test_a_launch_that_fails_is_repeated_with_pauses_and_given_up_after_a_while(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str
) -> None:
    ray.refusal = (500, "No available agent to submit job, please try again later.")
    ticks(settings, 60, apart=1)
    assert 4 <= ray.num_launches <= 8, "of sixty ticks"
    assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    waits = (
        "The service could not carry out the job's next action and keeps trying: Ray answered with status 500: "
        "No available agent"
    )
    assert sum(each.startswith(waits) for each in messages(client, job_id)) == 1
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute("UPDATE attempts SET reported_at = now() - interval '1 hour' WHERE job_id = %s", [job_id])
    ticks(settings, 1)
    assert messages(client, job_id)[0].startswith(
        "Attempt 1 of the job ended: Ray did not start the attempt within 900 s: No available"
    )
    ray.refusal = None
    rest(settings, job_id, 3600)
    ticks(settings, 2)
    assert f"{job_id}-2" in ray.jobs
    spool(settings, job_id, 2, reports(settings, job_id))
    ray.jobs[f"{job_id}-2"] = "SUCCEEDED"
    ticks(settings, 2)


def test_models_that_ray_does_not_take_are_sent_again_with_pauses(
    client: openai.OpenAI, settings: Settings, ray: Ray
) -> None:
    ray.takes_models = False
    job_id = submit(client, settings, x_raydpo={"reference": {"source": "serve"}})
    before = ray.num_puts
    ticks(settings, 60, apart=1)
    assert 4 <= ray.num_puts - before <= 8, "of sixty ticks"
    ray.takes_models = True
    ticks(settings, 1)
    assert len(ray.applications) == 1
    succeed(client, settings, ray, job_id)


def test_a_launch_whose_answer_was_lost_is_not_refused(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str
) -> None:
    ray.refusal = (500, f"ValueError: Job with submission_id {job_id}-1 already exists.")
    ticks(settings, 1)
    ray.jobs[f"{job_id}-1"] = "RUNNING"
    ticks(settings, 1)
    assert messages(client, job_id)[0] == "The job is starting on the cluster"
    ray.refusal = None
    succeed(client, settings, ray, job_id)


def test_a_policy_never_gets_the_name_of_another_jobs(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str
) -> None:
    """The test inserts the name into the database, because two jobs would not get the same one."""
    ticks(settings, 1)
    other = submit(client, settings)
    spec = AttemptSpec.model_validate_json(storage.read_bytes(shlex.split(ray.submissions[0]["entrypoint"])[-1]))
    assert spec.fine_tuned_model == f"ft:tiny:raydpo::{job_id.removeprefix('ftjob-')}"
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        of_other = (spec.fine_tuned_model, "proj_default", "s3://b/other", "tiny", other)
        rows.execute("INSERT INTO models (id, project_id, source, root, job_id) VALUES (%s, %s, %s, %s, %s)", of_other)
    spool(settings, job_id, 1, [Succeeded(model_uri="s3://b/own", trained_tokens=1)])
    ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(settings, TRIES - 1, apart=LONGEST_PAUSE_SECONDS)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    ticks(settings, TRIES + 1, apart=LONGEST_PAUSE_SECONDS)
    error = client.fine_tuning.jobs.retrieve(job_id).error
    assert error is not None
    assert error.code == "internal_error"
    assert f"cannot name its policy '{spec.fine_tuned_model}', because the job {other} has" in (error.message or "")
    client.fine_tuning.jobs.cancel(other)
    ticks(settings, 3)


def test_a_job_of_another_release_runs_or_ends_in_words_and_keeps_no_other_waiting(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str
) -> None:
    unlike, bare = submit(client, settings), submit(client, settings)
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute("UPDATE jobs SET spec = spec || '{\"dropped\": 1}' WHERE id = %s", [job_id])
        rows.execute(
            "UPDATE jobs SET spec = jsonb_set(spec, '{config,max_length}', '\"long\"') WHERE id = %s", [unlike]
        )
        (whole,) = rows.execute("SELECT spec::text FROM jobs WHERE id = %s", [bare]).fetchone() or ("",)
        rows.execute("UPDATE jobs SET spec = spec - 'num_workers' - 'config' WHERE id = %s", [bare])
        ticks(settings, 1)
        succeed(client, settings, ray, job_id)
        ticks(settings, 3)
        rows.execute("UPDATE jobs SET spec = %s WHERE id = %s", [whole, bare])
    for each, where in ((unlike, "max_length"), (bare, "config")):
        error = client.fine_tuning.jobs.retrieve(each).error
        assert error is not None
        assert (error.code, where in (error.message or "")) == ("unreadable_job", True)
    assert list(ray.jobs) == [f"{job_id}-1"]


def test_a_page_in_rays_place_says_nothing_of_its_jobs(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str
) -> None:
    ticks(settings, 1)
    ray.page = "<html>We are back soon.</html>"
    ticks(settings, TRIES + 2, apart=LONGEST_PAUSE_SECONDS)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    ray.page = None
    succeed(client, settings, ray, job_id)


def test_storage_that_fails_is_told_once_and_fails_no_job(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str
) -> None:
    if not settings.storage_url.startswith("file:"):
        pytest.skip("a file in the place of a folder makes the storage fail on a disk only")
    folder = Path(urlsplit(settings.storage_url).path) / "runs" / job_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("no folder")
    ticks(settings, TRIES + 2, apart=LONGEST_PAUSE_SECONDS)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    assert (
        sum(
            each.startswith("The service could not carry out the job's next action and keeps trying: the storage")
            for each in messages(client, job_id)
        )
        == 1
    )
    folder.unlink()
    ticks(settings, 1)
    succeed(client, settings, ray, job_id)


def test_silence_is_told_by_the_databases_clock_alone(
    client: openai.OpenAI, settings: Settings, ray: Ray, job_id: str, base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the replica that receives the reports is an hour late."""

    class Behind(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Behind":
            return cls.fromtimestamp(time.time() - timedelta(hours=1).total_seconds(), tz or UTC)

    ticks(settings, 1)
    monkeypatch.setattr(attempts, "datetime", Behind)
    assert post(ray, base_url, job_id).status_code == 200
    monkeypatch.undo()
    with psycopg.connect(settings.database_url) as rows:
        (silent,) = rows.execute("SELECT now() - reported_at FROM attempts WHERE job_id = %s", [job_id]).fetchone() or (
            None,
        )
    assert silent < timedelta(minutes=10)
    succeed(client, settings, ray, job_id)


def test_step_retries_grows_and_ends_when_the_job_moves() -> None:
    now = 0.0
    patience = Patience(lambda: now)
    due = []
    for _ in range(300):
        if patience.is_due("job", 1):
            patience.fail("job", 1)
            due.append(now)
        now += 1
    assert due[:7] == [0, 1, 2, 5, 12, 27, 58]
    assert due[7:10] == [118, 178, 238]
    assert patience.is_due("job", 2), "another wish is followed at once"
    assert patience.fail("job", 2) == 1
    patience.forget("job")
    assert patience.fail("job", 2) == 1


ASKED = httpx.Request("GET", "http://10.0.0.1:8265/api/jobs/")


@pytest.mark.parametrize(
    ("error", "ours", "words"),
    [
        (OperationalError("SELECT secret", {}, Exception("server closed the connection")), False, "the database does"),
        (NoConnection("QueuePool limit of size 30"), False, "the database does not answer"),
        (
            DataError("SELECT secret", {}, Exception("invalid byte\nLINE 1: secret")),
            True,
            "the database refused a value",
        ),
        (NoResultFound("No row was found"), True, "NoResultFound: No row was found"),
        (httpx.ConnectError("10.0.0.1 is away", request=ASKED), False, "the Ray cluster does not answer"),
        (PermissionError(13, "Permission denied", "/srv/secret"), False, "the storage failed: Permission denied"),
        (KeyError("model"), True, "KeyError: 'model'"),
    ],
)
def test_trouble_of_the_job_is_told_from_a_world_that_is_away(error: Exception, ours: bool, words: str) -> None:
    assert is_ours(error) is ours
    assert in_words(error).startswith(words)
    assert not {"secret", "10.0.0.1"} & set(in_words(error).replace(":", " ").split())


def test_a_launch_that_is_tried_again_gets_the_reference_of_the_settings_by_then(
    client: openai.OpenAI, settings: Settings, ray: Ray
) -> None:
    """An adapter is scored by the engine of its base, until its deployment's mode is merged."""
    name = "ft:tiny:raydpo::of-settings"
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute(
            "INSERT INTO jobs (id, project_id, spec, model_source, model_root, priority, desired, observed, version, "
            "fine_tuned_model, finished_at) VALUES "
            "('ftjob-of-settings', 'proj_default', '{}', '/m', 'tiny', 0, 'run', 'succeeded', 1, 'ft:tiny', now())"
        )
        rows.execute(
            "INSERT INTO models (id, project_id, source, root, base_source, adapter, job_id) "
            "VALUES (%s, 'proj_default', 's3://b/1', 'tiny', %s, '{\"r\": 8}', 'ftjob-of-settings')",
            [name, settings.models["tiny"].source],
        )
    ray.refusal = (503, "busy")
    job_id = submit(client, settings, x_raydpo={"reference": {"source": "serve", "model": name}})
    ticks(settings, 1)
    assert (ray.num_launches, [app.split("-")[2] for app in ray.applications]) == (1, ["tiny"])
    client.put(f"/x/deployments/{name}", body={"mode": "merged"}, cast_to=object)
    ray.refusal = None
    ticks(settings, 2)
    spec = AttemptSpec.model_validate_json(storage.read_bytes(shlex.split(ray.submissions[0]["entrypoint"])[-1]))
    assert spec.reference_adapter is None
    assert spec.reference in ray.applications
    assert ray.serve[str(spec.reference)]["deployed_app_config"]["args"]["source"] == "s3://b/1"
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)

"""Tests the life of a job with a stand-in for Ray that gives wrong answers, dies and loses answers.

The database and the storage are real.
"""

import asyncio
import csv
import json
import shlex
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import openai
import psycopg
import pytest
from sqlalchemy import func, update

from dpo_core.config import EarlyStop, TrainConfig
from services import storage
from services.contract import (
    Alive,
    AttemptSpec,
    CheckpointSaved,
    Died,
    EventBatch,
    Failed,
    JobEvent,
    Paused,
    ReferenceReleased,
    ReferenceWanted,
    Report,
    Started,
    StepMetrics,
    Succeeded,
)
from services.control_plane.attempts import reconciler
from services.control_plane.attempts.decision import Decision
from services.control_plane.attempts.executor import Executor
from services.control_plane.attempts.reconciler import Reconciler
from services.control_plane.cleanup import stop_orphans
from services.control_plane.core.store import History, Store, live_jobs
from services.control_plane.core.tables import Attempt, Job, Lease, Transition
from services.control_plane.jobs import jobs
from services.control_plane.ray_api import RayApi, Submission
from services.control_plane.settings import Settings
from services.spool import segment_uri, write
from tests.services.control_plane.conftest import FakeRay, pairs
from tests.services.test_deaths import OUT_OF_MEMORY


@pytest.fixture
def ray(fake_ray: FakeRay) -> FakeRay:
    fake_ray.jobs.clear()
    fake_ray.submissions.clear()
    fake_ray.told.clear()
    fake_ray.lose_answers = fake_ray.down = False
    fake_ray.resources = {"CPU": 8.0}
    return fake_ray


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay) -> Settings:
    """Returns the settings of the service in this process, and of the reconcilers that the tests run."""
    return offline.model_copy(update={"ray_url": f"http://127.0.0.1:{fake_ray.server.server_port}"})


@pytest.fixture
def job_id(client: openai.OpenAI, settings: Settings, ray: FakeRay) -> Iterator[str]:
    yield submit(client, settings)
    # Whatever a test left alive would take the slot of the next one.
    for job in client.fine_tuning.jobs.list():
        assert job.status in ("succeeded", "failed", "cancelled")


def submit(client: openai.OpenAI, settings: Settings, **extension: Any) -> str:
    """Creates a job on a new file that has been checked, and returns the job's id."""
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    ticks(settings, 1)
    method: Any = {"type": "dpo"}
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, method=method, extra_body=extension or None
    ).id


def spec_of(submission: dict[str, Any]) -> AttemptSpec:
    return AttemptSpec.model_validate_json(storage.read_bytes(shlex.split(submission["entrypoint"])[-1]))


def ticks(settings: Settings, count: int, *, planes: int = 1, apart: float = 0, rested: bool = True) -> None:
    """Runs `count` ticks of a reconciler, which first takes the lease from the service's own reconciler.

    `apart` is the number of seconds from one tick to the next by the reconcilers' clock. If `rested` is true, attempts
    that died count as having died long ago.
    """
    now = 0.0

    async def run() -> None:
        nonlocal now
        store = Store(settings.database_url)
        ray_api = RayApi(settings, store.instance)
        reconcilers = [
            Reconciler(store, ray_api, settings, holder=f"test-{i}", clock=lambda: now) for i in range(planes)
        ]
        async with store.begin() as session:
            await session.execute(update(Lease).values(holder="test-0", expires_at=func.now() + timedelta(hours=1)))
        for _ in range(count):
            # A tick that Ray's silence ends is tried again, as `run` does.
            done = await asyncio.gather(*(reconciler.tick() for reconciler in reconcilers), return_exceptions=True)
            assert all(isinstance(outcome, httpx.HTTPError | None) for outcome in done), done
            now += apart
            async with store.begin() as session:
                long_ago = update(Attempt).where(Attempt.failed).values(ended_at=Attempt.ended_at - timedelta(hours=2))
                await session.execute(long_ago) if rested else None
        async with store.begin() as session:
            await session.execute(update(Lease).values(expires_at=func.now() + timedelta(hours=1)))
        await ray_api.close()
        await store.close()

    asyncio.run(run())


def spool(settings: Settings, job_id: str, attempt: int, reports: list[Report], *, first: int = 0) -> EventBatch:
    """Writes reports to storage, where an attempt's driver would have written them."""
    events = [JobEvent(seq=first + i, created_at=time.time(), report=report) for i, report in enumerate(reports)]
    batch = EventBatch(events=events)
    uri = segment_uri(storage.join(settings.storage_url, "runs", job_id), attempt, first)
    write(uri, batch.model_dump_json().encode())
    return batch


def reports(settings: Settings, job_id: str, steps: int = 3) -> list[Report]:
    run = storage.join(settings.storage_url, "runs", job_id)
    metrics = {"loss": 0.5, "rewards/margins": 1.0, "rewards/accuracies": 0.75}
    config = TrainConfig().resolved(12)
    return [
        Started(config=config, num_groups=12, total_steps=steps),
        *(StepMetrics(step=step, total_steps=steps, metrics=metrics) for step in range(1, steps + 1)),
        CheckpointSaved(step=steps, uri=storage.join(run, "checkpoints", f"step-{steps:06}"), metrics=metrics),
        Succeeded(model_uri=storage.join(run, "export"), trained_tokens=1234),
    ]


def test_a_job_runs_to_its_model_though_no_report_ever_arrived_by_post(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    assert not ray.applications, "no reference is loaded before the attempt has found that this pays"
    spec = spec_of(ray.submissions[0])
    assert (spec.job_id, spec.attempt) == (job_id, 1)
    assert spec.reference is not None
    cache_uri = storage.join(settings.storage_url, "prepared", "proj_default")  # of the project: no other learns of it
    assert (spec.reference_source, spec.cache_uri) == ("auto", cache_uri)
    assert spec.dataset_uris is None

    spool(settings, job_id, 1, reports(settings, job_id))
    ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(settings, 2)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.trained_tokens, len(ray.submissions)) == ("succeeded", 1234, 1)
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.n_epochs == 1  # resolved
    lines = client.files.content(job.result_files[0]).text.splitlines()
    assert lines[0].startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy")
    assert len(lines) == 4
    names = [checkpoint.fine_tuned_model_checkpoint for checkpoint in client.fine_tuning.jobs.checkpoints.list(job_id)]
    assert names == [f"{job.fine_tuned_model}:ckpt-step-3"]
    assert {job.fine_tuned_model, *names} <= {model.id for model in client.models.list()}


def found(settings: Settings, file_id: str, report: dict[str, Any] | None = None, refusal: str | None = None) -> None:
    """Stores the result of the check of a file with a model, so that the service does not check it.

    Without a report and a refusal, the check has not ended.
    """
    with psycopg.connect(settings.database_url) as rows:
        lease = "INSERT INTO leases VALUES (%s, 'a test', now() + interval '1 hour') ON CONFLICT DO NOTHING"
        rows.execute(lease, [f"check of {file_id}"])
        written = "UPDATE files SET report = %s::jsonb, refusal = %s WHERE id = %s"
        rows.execute(written, [report and json.dumps(report), refusal, file_id])


def test_a_job_on_a_file_that_is_still_being_checked_waits_for_the_check(
    client: openai.OpenAI, settings: Settings, ray: FakeRay
) -> None:
    files = [client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id for _ in range(4)]
    report = {"kind": "pairs", "num_rows": 12}
    ticks(settings, 1)
    for file_id in files:
        found(settings, file_id)
    dpo: Any = {"type": "dpo"}
    create = client.fine_tuning.jobs.create
    waiting = [create(model="tiny", training_file=file_id, method=dpo) for file_id in files[:3]]
    checked = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id
    waiting.append(create(model="tiny", training_file=checked, validation_file=files[3], method=dpo))
    behind = submit(client, settings)
    ticks(settings, 3)
    for job, file_id in zip(waiting, files, strict=True):
        now = client.fine_tuning.jobs.retrieve(job.id)
        told = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        assert now.status == "queued"
        assert now.model_extra["x_raydpo"]["waits_for"].startswith(f"the check of its file {file_id} (")
        assert sum(message.startswith(f"Waiting for the check of its file {file_id}") for message in told) == 1
        assert any(message.startswith("Files are still being validated, moving job to queued") for message in told)
    assert client.fine_tuning.jobs.retrieve(behind).status == "running"
    client.fine_tuning.jobs.cancel(behind)
    ticks(settings, 4)

    found(settings, files[0], refusal="Line 7 is not a dictionary; mend it.")
    found(settings, files[1], report={"kind": "demonstrations", "num_rows": 12})
    found(settings, files[2], report=report | {"num_rows": 3})
    found(settings, files[3], refusal="Line 9 is not a dictionary; mend it.")
    ticks(settings, 6)
    ends = [client.fine_tuning.jobs.retrieve(job.id) for job in waiting]
    assert [(end.status, end.error and (end.error.code, end.error.param)) for end in ends] == [
        ("failed", ("invalid_training_file", "training_file")),
        ("failed", ("invalid_training_file", "training_file")),
        ("failed", ("invalid_n_examples", "training_file")),
        ("failed", ("invalid_validation_file", "validation_file")),
    ]
    assert ends[0].error.message == f"The file {files[0]} cannot be used: Line 7 is not a dictionary; mend it."
    assert not any(name.startswith(job.id) for name in ray.jobs for job in waiting)  # nothing was launched for them

    found(settings, files[0])
    job = create(model="tiny", training_file=files[0], method=dpo)
    found(settings, files[0], report=report)
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    client.fine_tuning.jobs.cancel(job.id)
    ticks(settings, 4)


def test_a_reference_is_served_once_an_attempt_wants_it(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str, base_url: str
) -> None:
    ticks(settings, 1)
    token = ray.submissions[0]["runtime_env"]["env_vars"]["RAYDPO_ATTEMPT_TOKEN"]
    spec = spec_of(ray.submissions[0])
    body = spool(settings, job_id, 1, [ReferenceWanted()]).model_dump(mode="json")
    url = f"{base_url}/internal/attempts/{job_id}/1/events"
    assert httpx.post(url, json=body, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    ticks(settings, 1)
    assert ray.applications == [spec.reference]
    spool(settings, job_id, 1, [ReferenceReleased(), *reports(settings, job_id)], first=1)
    ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"


@pytest.mark.parametrize("of_older_release", [False, True])
def test_an_attempt_gets_the_engine_it_was_told_of_although_settings_changed(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str, base_url: str, of_older_release: bool
) -> None:
    ticks(settings, 1)
    token = ray.submissions[0]["runtime_env"]["env_vars"]["RAYDPO_ATTEMPT_TOKEN"]
    spec = spec_of(ray.submissions[0])
    client.put("/x/deployments/tiny", body={"dtype": "bfloat16"}, cast_to=object)  # an engine of its own would score
    wanted = ReferenceWanted(app_name=None if of_older_release else spec.reference)
    body = spool(settings, job_id, 1, [wanted]).model_dump(mode="json")
    url = f"{base_url}/internal/attempts/{job_id}/1/events"
    assert httpx.post(url, json=body, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    ticks(settings, 1)
    args = ray.serve[str(spec.reference)]["deployed_app_config"]["args"]
    assert (args["app_name"], args["dtype"]) == (spec.reference, "float32")
    client.delete("/x/deployments/tiny", cast_to=object)
    spool(settings, job_id, 1, reports(settings, job_id), first=1)
    ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"


def test_an_attempt_that_insists_on_a_served_reference_finds_it_wished_for(
    client: openai.OpenAI, settings: Settings, ray: FakeRay
) -> None:
    job_id = submit(client, settings, x_raydpo={"reference": {"source": "serve"}})
    ticks(settings, 1)
    spec = spec_of(ray.submissions[0])
    assert ray.applications == [spec.reference]
    started, *rest = reports(settings, job_id)
    spool(settings, job_id, 1, [started])
    ray.jobs[f"{job_id}-1"] = "FAILED"
    ticks(settings, 3)
    with psycopg.connect(settings.database_url) as database:
        (again,) = database.execute("SELECT reference FROM attempts WHERE job_id = %s AND number = 2", [job_id])
    assert (again, spec_of(ray.submissions[1]).reference) == ((None,), spec.reference)  # the scores are in
    spool(settings, job_id, 2, rest)
    ray.jobs[f"{job_id}-2"] = "SUCCEEDED"
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"


def test_no_reference_is_served_to_a_job_whose_trainer_scores(
    client: openai.OpenAI, settings: Settings, ray: FakeRay
) -> None:
    job_id = submit(client, settings, x_raydpo={"reference": {"source": "trainer"}, "truncation": "keep_end"})
    ticks(settings, 1)
    spec = spec_of(ray.submissions[0])
    assert (spec.reference, spec.reference_source, spec.config.truncation) == (None, "trainer", "keep_end")
    spool(settings, job_id, 1, [ReferenceReleased(), *reports(settings, job_id)])
    ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"


def test_held_out_rows_reach_the_attempt_and_what_it_makes_of_them_reaches_the_user(
    client: openai.OpenAI, settings: Settings, ray: FakeRay
) -> None:
    files = [client.files.create(file=("pairs.jsonl", pairs(count)), purpose="fine-tune").id for count in (12, 3)]
    ticks(settings, 1)
    job_id = client.fine_tuning.jobs.create(
        model="tiny", training_file=files[0], validation_file=files[1], method={"type": "dpo"}
    ).id
    ticks(settings, 1)
    spec = spec_of(ray.submissions[0])
    assert spec.validation_uri is not None
    assert (storage.read_bytes(spec.validation_uri), spec.validation_share) == (pairs(3), 0.0)

    started, *steps, saved, succeeded = reports(settings, job_id, steps=2)
    found = {"eval/loss": 0.6, "eval/rewards/accuracies": 0.5, "eval/rewards/margins": 0.25, "eval/kl": 0.125}
    steps[-1], saved = (r.model_copy(update={"metrics": r.metrics | found}) for r in (steps[-1], saved))
    spool(settings, job_id, 1, [started, *steps, saved, succeeded])
    ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(settings, 2)
    told = {"valid_loss": 0.6, "valid_reward_accuracy": 0.5, "valid_reward_margin": 0.25}
    told |= {f"full_{name}": value for name, value in told.items()} | {"eval/kl": 0.125}
    last, first = [e for e in client.fine_tuning.jobs.list_events(job_id, limit=100) if e.type == "metrics"]
    assert last.message.endswith("full validation loss=0.6000")
    assert told.items() <= dict(last.data).items()
    assert not told.keys() & dict(first.data)
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job_id)
    assert told.items() <= checkpoint.metrics.to_dict().items()
    job = client.fine_tuning.jobs.retrieve(job_id)
    rows = list(csv.DictReader(client.files.content(job.result_files[0]).text.splitlines()))
    assert [[row[name] for name in told] for row in rows] == [[""] * len(told), [str(v) for v in told.values()]]


@pytest.mark.parametrize(
    ("asked", "wire"),
    [
        ({"keep_checkpoints": 1, "best_metric": "eval/rewards/margins"}, 1),  # which are the service's own affair
        ({"early_stop": {"patience": 3}}, 2),
        ({"policy": "best"}, 2),
    ],
)
def test_a_driver_that_would_overlook_which_checkpoint_is_wanted_refuses_the_attempt(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, asked: dict[str, Any], wire: int
) -> None:
    extension = {"validation_share": 0.25, "adapter": "none"} | asked
    job_id = submit(client, settings, x_raydpo=extension)
    ticks(settings, 1)
    spec = spec_of(ray.submissions[0])
    assert (spec.wire, spec.policy) == (wire, asked.get("policy", "last"))
    assert spec.config.early_stop == (EarlyStop(patience=3) if "early_stop" in asked else None)
    client.fine_tuning.jobs.cancel(job_id)
    ray.jobs[f"{job_id}-1"] = "STOPPED"
    ticks(settings, 2)


@pytest.mark.slow
def test_unknown_is_never_failed_and_a_lost_cluster_counts_against_nobody(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    ray.down = True
    ticks(settings, 3)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    ray.down = False
    for number in range(1, 6):  # more often than attempts may fail
        ray.jobs.clear()  # a new cluster knows none of the old one's jobs
        ticks(settings, 2)
        assert list(ray.jobs) == [f"{job_id}-{number + 1}"]
    spool(settings, job_id, 6, [Failed(code="invalid_training_file", message="It is bad.", param="training_file")])
    ray.jobs[f"{job_id}-6"] = "FAILED"
    ticks(settings, 2)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.message, job.error.param) == (
        "invalid_training_file",
        "It is bad.",
        "training_file",
    )


def test_a_job_whose_attempts_keep_dying_fails_and_says_that_it_was_not_the_user(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    for number in range(1, settings.max_attempts + 1):
        ticks(settings, 2)
        ray.jobs[f"{job_id}-{number}"] = "FAILED"
    ray.told[f"{job_id}-{settings.max_attempts}"] = {"message": OUT_OF_MEMORY, "driver_exit_code": 1}
    ticks(settings, 3)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.error is not None
    assert (job.status, job.error.code, len(ray.submissions)) == ("failed", "infrastructure_failure", 5)
    assert "the last time because memory ran out on the node 192.0.2.2: 22.41 GB of 23.54 GB" in str(job.error.message)
    assert f"raydpo jobs logs {job_id}" in str(job.error.message)


def state(client: openai.OpenAI, job_id: str) -> tuple[str, Any]:
    job = client.fine_tuning.jobs.retrieve(job_id).to_dict()
    return str(job["status"]), job["x_raydpo"]["waits_for"]  # type: ignore[index]


def rest(settings: Settings, job_id: str, seconds: float) -> None:
    """Moves the end of the job's attempts `seconds` into the past."""
    with psycopg.connect(settings.database_url) as connection:
        statement = "UPDATE attempts SET ended_at = ended_at - make_interval(secs => %s) WHERE job_id = %s"
        connection.execute(statement, (seconds, job_id))


def test_what_killed_an_attempt_is_told_and_waited_out_longer_each_time(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    for number, seconds in ((1, 5), (2, 25), (3, 125)):
        ray.told[f"{job_id}-{number}"] = {"message": OUT_OF_MEMORY, "driver_exit_code": 1}
        ray.jobs[f"{job_id}-{number}"] = "FAILED"
        ticks(settings, 2, rested=False)
        counted = f"{number} of at most 5 attempts in a row died without a new checkpoint"
        assert state(client, job_id) == ("running", f"its next attempt, {seconds} s after the last one: {counted}")
        event = client.fine_tuning.jobs.list_events(job_id, limit=1).data[0]
        assert (event.level, event.message) == (
            "warn",
            f"Attempt {number} of the job ended: memory ran out on the node 192.0.2.2: 22.41 GB of 23.54 GB were in "
            f"use; Ray killed processes that held 0.14 GB; the next attempt begins {seconds} s later",
        )
        rest(settings, job_id, seconds - 3)
        ticks(settings, 1, rested=False)
        assert len(ray.submissions) == number
        rest(settings, job_id, 3)
        ticks(settings, 1, rested=False)
        assert len(ray.submissions) == number + 1
        assert state(client, job_id) == ("running", None)
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)


def test_a_job_that_rests_for_minutes_lets_others_run_and_then_takes_its_turn(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    other = submit(client, settings)
    for number, seconds in ((1, 5), (2, 25)):  # in so short rests its place is its own
        ray.jobs[f"{job_id}-{number}"] = "FAILED"
        ticks(settings, 2, rested=False)
        assert state(client, other) == (
            "queued",
            ("another job to end, because at most 1 may run at once (setting max_running_jobs)"),
        )
        rest(settings, job_id, seconds)
        ticks(settings, 1, rested=False)
    ray.jobs[f"{job_id}-3"] = "FAILED"
    ticks(settings, 2, rested=False)
    assert state(client, other) == ("running", None)
    assert str(state(client, job_id)[1]).startswith("its next attempt, 125 s after the last one")
    rest(settings, job_id, 125)
    ticks(settings, 2, rested=False)
    assert state(client, job_id) == (
        "running",
        ("another job to end, because at most 1 may run at once (setting max_running_jobs)"),
    )
    told = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]
    assert (
        told.count("Waiting for another job to end, because at most 1 may run at once (setting max_running_jobs)") == 1
    )
    assert f"{job_id}-4" not in ray.jobs
    spool(settings, other, 1, reports(settings, other))
    ray.jobs[f"{other}-1"] = "SUCCEEDED"
    ticks(settings, 3, rested=False)
    assert ray.jobs[f"{job_id}-4"] == "RUNNING"
    assert state(client, job_id) == ("running", None)
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)


def test_a_job_that_waits_for_its_turn_after_a_long_rest_is_cancelled_at_once(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    other = submit(client, settings)
    for number in (1, 2, 3):
        ray.jobs[f"{job_id}-{number}"] = "FAILED"
        ticks(settings, 2, rested=False)
        rest(settings, job_id, 25 if number < 3 else 0)
        ticks(settings, 1, rested=False)
    rest(settings, job_id, 125)
    ticks(settings, 1, rested=False)
    assert state(client, other)[0] == "running"
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 1)
    assert state(client, job_id) == ("cancelled", None)
    client.fine_tuning.jobs.cancel(other)
    ticks(settings, 3)


def test_a_job_that_comes_back_from_a_long_rest_waits_for_workers_that_are_there(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    for number in (1, 2, 3):
        ray.jobs[f"{job_id}-{number}"] = "FAILED"
        ticks(settings, 2, rested=False)
        rest(settings, job_id, (5, 25, 125)[number - 1])
        ray.resources = {"CPU": 8.0} if number < 3 else {"CPU": 0.0}
        ticks(settings, 1, rested=False)
    told = "a larger cluster, because the job needs 1 CPU but the cluster has 0; after 7 days of this, the job fails"
    assert state(client, job_id) == ("running", told)
    ray.resources = {"CPU": 8.0}
    ticks(settings, 1, rested=False)
    assert ray.jobs[f"{job_id}-4"] == "RUNNING"
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)


def test_an_attempt_that_left_a_new_checkpoint_begins_the_count_anew(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    """A job that makes progress goes on, however often its workers are killed."""
    ticks(settings, 1)
    for number in range(1, 2 * settings.max_attempts):
        steps = number // 3  # two of three attempts leave the checkpoint that was there
        spool(settings, job_id, number, reports(settings, job_id, steps=steps)[:-1] if steps else [])
        ray.jobs[f"{job_id}-{number}"] = "FAILED"
        ticks(settings, 1, rested=False)
        waits_for = state(client, job_id)[1]
        assert waits_for.endswith(
            f"{number % 3 + 1 if steps else number} of at most 5 attempts in a row died without a new checkpoint"
        )
        rest(settings, job_id, 3600)
        ticks(settings, 1, rested=False)
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)


def test_an_attempt_says_itself_why_it_dies(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    """Ray shows only the last ten lines of a log, and its own message about memory is longer."""
    ticks(settings, 1)
    spool(settings, job_id, 1, [Died(cause="memory ran out on the node 192.0.2.2: 22 GB of 24 GB were in use")])
    ray.told[f"{job_id}-1"] = {"message": "RayTaskError: something", "driver_exit_code": 1}
    ray.jobs[f"{job_id}-1"] = "FAILED"
    ticks(settings, 1)
    told = client.fine_tuning.jobs.list_events(job_id, limit=1).data[0].message
    assert told.startswith(
        "Attempt 1 of the job ended: memory ran out on the node 192.0.2.2: 22 GB of 24 GB were in use; "
    )
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)


def test_a_job_that_is_paused_and_resumed_need_not_wait_out_what_killed_it(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    ray.jobs[f"{job_id}-1"] = "FAILED"
    ticks(settings, 1, rested=False)
    client.fine_tuning.jobs.pause(job_id)
    ticks(settings, 1, rested=False)
    assert state(client, job_id) == ("paused", None)
    client.fine_tuning.jobs.resume(job_id)
    ticks(settings, 1, rested=False)
    assert (state(client, job_id), len(ray.submissions)) == (("running", None), 2)
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)


def test_the_end_of_an_attempt_is_told_once_by_however_many_control_planes(
    settings: Settings, ray: FakeRay, client: openai.OpenAI, job_id: str
) -> None:
    """If a tick lasts longer than its lease, two reconcilers carry out the same decision."""
    ticks(settings, 1)

    async def lose_twice() -> None:
        store = Store(settings.database_url)
        ray_api = RayApi(settings, store.instance)
        executor = Executor(store, ray_api, settings, holder="test")
        async with store.begin() as session:
            job, attempt = await session.get_one(Job, job_id), await session.get_one(Attempt, (job_id, 1))
        for _ in range(2):
            await executor.carry_out(Decision.LOSE, job, attempt, History(1, 0, 0.0), Submission("ended", exit_code=-9))
        await ray_api.close()
        await store.close()

    asyncio.run(lose_twice())
    told = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]
    (over,) = [message for message in told if message.startswith("Attempt 1 of the job ended: ")]
    assert "the signal SIGKILL killed its process (the system sends it when memory runs out)" in over
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)


def test_a_tick_asks_ray_once_for_all_attempts_and_for_nothing_of_paused_jobs(
    client: openai.OpenAI, settings: Settings, ray: FakeRay
) -> None:
    many = settings.model_copy(update={"max_running_jobs": 4})
    running = [submit(client, settings) for _ in range(3)]
    paused = [submit(client, settings) for _ in range(2)]
    for job_id in paused:
        client.fine_tuning.jobs.pause(job_id)
    ticks(many, 1)
    ray.asked.clear()
    ticks(many, 1)
    assert [path for path in ray.asked if path.startswith("/api/jobs")] == ["/api/jobs/"]

    async def live() -> set[str]:
        store = Store(settings.database_url)
        async with store.begin() as session:
            found = {job.id for job in await live_jobs(session)}
        await store.close()
        return found

    assert asyncio.run(live()) == set(running)
    for job_id in (*running, *paused):
        client.fine_tuning.jobs.cancel(job_id)
    ticks(many, 3)


def test_what_a_tick_asks_ray_is_asked_at_once(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If slow answers came one after the other, they would last longer than the lease."""
    ticks(settings, 1)
    waiting = submit(client, settings)
    all_asked, get = threading.Barrier(3, timeout=60), ray.get
    seen: set[str] = set()

    def hold(path: str) -> tuple[int, Any]:
        if path not in seen:
            seen.add(path)
            all_asked.wait()  # raises where the others are not asked meanwhile
        return get(path)

    monkeypatch.setattr(ray, "get", hold)
    ticks(settings, 1)
    assert not all_asked.broken
    assert seen == {"/api/jobs/", "/api/serve/applications/", "/api/v0/nodes"}
    monkeypatch.undo()
    for each in (job_id, waiting):
        client.fine_tuning.jobs.cancel(each)
    ticks(settings, 3)


def test_an_attempt_that_ray_leaves_out_of_its_list_is_asked_for_before_it_is_given_up(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks(settings, 1)
    get = ray.get
    monkeypatch.setattr(ray, "get", lambda path: (200, []) if path == "/api/jobs/" else get(path))
    ticks(settings, 2)
    assert len(ray.submissions) == 1
    monkeypatch.undo()
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)


def test_several_control_planes_act_as_one(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 3, planes=3)
    assert len(ray.submissions) == 1
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3, planes=3)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "cancelled"


def test_a_project_out_of_accelerator_hours_opens_no_attempt_and_keeps_its_job(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str, api: httpx.Client
) -> None:
    on_gpus = settings.model_copy(update={"num_gpus_per_worker": 2})
    ray.resources = {"CPU": 8.0, "GPU": 2.0}
    api.post("/x/projects/proj_default", json={"max_accelerator_hours": 0})
    ticks(on_gpus, 2)
    assert (client.fine_tuning.jobs.retrieve(job_id).status, ray.submissions) == ("queued", [])
    waits_for = client.fine_tuning.jobs.retrieve(job_id).to_dict()["x_raydpo"]["waits_for"]  # type: ignore[index]
    assert waits_for == (
        "accelerator hours, because its project has used all 0; an admin can raise max_accelerator_hours"
    )
    api.post("/x/projects/proj_default", json={"max_accelerator_hours": 1})
    ticks(on_gpus, 1)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    hours = api.get("/x/projects/proj_default/usage").json()["limits"]["max_accelerator_hours"]["used"]
    assert 0 < hours < 0.1
    # What runs goes on.
    api.post("/x/projects/proj_default", json={"max_accelerator_hours": 0})
    ticks(on_gpus, 1)
    spool(settings, job_id, 1, reports(settings, job_id))
    ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(on_gpus, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"
    in_all = api.get("/x/projects/proj_default/usage").json()["limits"]["max_accelerator_hours"]["used"]
    assert hours < in_all < 0.1
    api.post("/x/projects/proj_default", json={"max_accelerator_hours": None})


def test_a_job_that_ends_makes_room_for_the_next_one_at_once(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = submit(client, settings), submit(client, settings)
    ticks(settings, 2)
    assert list(ray.jobs) == [f"{first}-1"]
    spool(settings, first, 1, reports(settings, first))
    ray.jobs[f"{first}-1"] = "SUCCEEDED"
    monkeypatch.setattr(reconciler, "TICK_SECONDS", 3600)

    async def run() -> None:
        store = Store(settings.database_url)
        ray_api = RayApi(settings, store.instance)
        task = asyncio.create_task(Reconciler(store, ray_api, settings, holder="test-0").run())
        async with asyncio.timeout(60):
            while f"{second}-1" not in ray.jobs:  # noqa: ASYNC110 - another thread's list
                await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await ray_api.close()
        await store.close()

    asyncio.run(run())
    client.fine_tuning.jobs.cancel(second)
    ticks(settings, 4)


def test_a_waiting_job_whose_row_is_held_delays_no_other_and_is_told_later(
    client: openai.OpenAI, settings: Settings, ray: FakeRay
) -> None:
    running, held, other = (submit(client, settings) for _ in range(3))
    ticks(settings, 1)
    told = "another job to end, because at most 1 may run at once (setting max_running_jobs)"

    def waits() -> list[str | None]:
        jobs = (client.fine_tuning.jobs.retrieve(job_id) for job_id in (running, held, other))
        return [job.model_extra["x_raydpo"]["waits_for"] for job in jobs if job.model_extra]

    with psycopg.connect(settings.database_url) as rows:
        rows.execute("UPDATE jobs SET waits_for = NULL WHERE id IN (%s, %s)", [held, other])
        rows.commit()
        rows.execute("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", [held])
        began = time.monotonic()
        ticks(settings, 1)
        assert time.monotonic() - began < 25  # the server would end the wait for a lock after 30 seconds
        assert waits() == [None, None, told]
    ticks(settings, 1)
    assert waits() == [None, told, told]
    events = [event.message for event in client.fine_tuning.jobs.list_events(other)]
    assert events.count(f"Waiting for {told}") == 2  # once more, as the test forgot it
    for job_id in (held, other, running):
        client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 4)


def test_jobs_start_before_others_are_ended(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = settings.model_copy(update={"max_running_jobs": 3})
    ending = [submit(client, settings) for _ in range(2)]
    ticks(wide, 2)
    for job_id in ending:
        spool(settings, job_id, 1, reports(settings, job_id))
        ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    starts = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"}).id
    done: list[tuple[str, Decision]] = []
    carry_out = Executor.carry_out

    async def noted(self: Executor, decision: Decision, job: Job, *rest: Any) -> None:
        await carry_out(self, decision, job, *rest)
        done.append((job.id, decision))

    monkeypatch.setattr(Executor, "carry_out", noted)
    monkeypatch.setattr(reconciler, "AT_ONCE", 1)
    ticks(wide, 1)
    assert done[0] == (starts, Decision.OPEN)
    assert set(done[1:]) == {(job_id, Decision.FINISH) for job_id in ending}
    monkeypatch.undo()
    client.fine_tuning.jobs.cancel(starts)
    ticks(settings, 4)


def test_a_job_that_does_not_fit_waits_and_says_for_what(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    def waits_for() -> object:
        return client.fine_tuning.jobs.retrieve(job_id).to_dict()["x_raydpo"]["waits_for"]  # type: ignore[index]

    ray.resources = {"CPU": 0.0}
    ticks(settings, 3)
    told = "a larger cluster, because the job needs 1 CPU but the cluster has 0; after 7 days of this, the job fails"
    assert (waits_for(), ray.submissions) == (told, [])
    told = [event.message for event in client.fine_tuning.jobs.list_events(job_id)]
    assert sum(message.startswith("Waiting for a larger cluster") for message in told) == 1
    ray.resources = {"CPU": 8.0}
    ticks(settings, 2)
    assert (waits_for(), len(ray.submissions)) == (None, 1)
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)


def test_a_job_that_has_not_fit_for_a_week_fails_and_a_week_with_a_break_is_none(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    def wait_a_week() -> None:
        with psycopg.connect(settings.database_url) as connection:
            connection.execute("UPDATE jobs SET misfit_since = misfit_since - interval '8 days'")

    full = settings.model_copy(update={"max_running_jobs": 0})  # a job that fits has to wait as well
    ray.resources = {"CPU": 0.0}
    ticks(full, 2)
    ray.resources = {"CPU": 8.0}
    ticks(full, 2)
    wait_a_week()
    ray.resources = {"CPU": 0.0}
    ticks(full, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "queued"
    wait_a_week()
    ticks(full, 1)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.error
    assert (job.status, job.error.code) == ("failed", "does_not_fit")
    assert job.error.message.startswith("The job waited 7 days for a larger cluster, because the job needs 1 CPU but")
    ray.resources = {"CPU": 8.0}


def test_a_week_in_which_nobody_looked_does_not_count(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ray.resources = {"CPU": 0.0}
    ticks(settings, 2)
    for seen_at in ("misfit_seen_at - interval '8 days'", "NULL"):
        with psycopg.connect(settings.database_url) as connection:
            times = f"misfit_since = misfit_since - interval '8 days', misfit_seen_at = {seen_at}"
            connection.execute(f"UPDATE jobs SET {times}")
        ticks(settings, 2)
        assert client.fine_tuning.jobs.retrieve(job_id).status == "queued"
        with psycopg.connect(settings.database_url) as connection:
            query = "SELECT misfit_since > now() - interval '1 hour' FROM jobs WHERE id = %s"
            assert connection.execute(query, [job_id]).fetchone() == (True,)
    client.fine_tuning.jobs.cancel(job_id)
    ray.resources = {"CPU": 8.0}


def test_a_job_that_another_transaction_changes_does_not_fail_before_its_times_are_known(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    """A locked row keeps the times of the last look, which may be long ago. No tick waits for it."""
    ray.resources = {"CPU": 0.0}
    ticks(settings, 2)
    with psycopg.connect(settings.database_url) as connection:
        times = "misfit_since = misfit_since - interval '8 days', misfit_seen_at = misfit_seen_at - interval '8 days'"
        connection.execute(f"UPDATE jobs SET {times}")
        connection.commit()
        connection.execute("SELECT 1 FROM jobs WHERE id = %s FOR NO KEY UPDATE", [job_id])
        ticks(settings, 1)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "queued"
    client.fine_tuning.jobs.cancel(job_id)
    ray.resources = {"CPU": 8.0}


def test_a_job_that_cannot_be_failed_delays_no_other(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_misfit = Executor.fail_misfit

    async def refuse(self: Executor, job: Job, *rest: Any) -> None:
        if job.id == job_id:
            raise ValueError("cannot be failed")
        await fail_misfit(self, job, *rest)

    ray.resources = {"CPU": 0.0}
    other = submit(client, settings)
    ticks(settings, 2)
    monkeypatch.setattr(Executor, "fail_misfit", refuse)
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("UPDATE jobs SET misfit_since = misfit_since - interval '8 days'")
    ticks(settings, 1)
    assert [client.fine_tuning.jobs.retrieve(each).status for each in (job_id, other)] == ["queued", "failed"]
    monkeypatch.undo()
    ticks(settings, 1)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "failed"
    ray.resources = {"CPU": 8.0}


def test_what_runs_for_an_attempt_that_ended_is_stopped_and_what_is_not_ours_is_left(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)
    foreign = "ftjob-0123456789abcdef01234567-1"
    ray.jobs |= {f"{job_id}-1": "RUNNING", foreign: "RUNNING"}  # the first was launched late, by whom it took an hour

    async def sweep() -> list[str]:
        store = Store(settings.database_url)
        ray_api = RayApi(settings, store.instance)
        within_grace = await stop_orphans(store, ray_api)
        async with store.begin() as session:
            await session.execute(update(Attempt).values(ended_at=func.now() - timedelta(hours=1)))
        stopped = await stop_orphans(store, ray_api)
        await ray_api.close()
        await store.close()
        return [*within_grace, "then", *stopped]

    assert asyncio.run(sweep()) == ["then", f"{job_id}-1"]
    assert ray.jobs == {f"{job_id}-1": "STOPPED", foreign: "RUNNING"}


def test_the_log_of_a_job_replays_to_what_it_is_and_refuses_what_no_rule_allows(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)

    async def read() -> tuple[Job, list[Transition]]:
        store = Store(settings.database_url)
        async with store.begin() as session:
            found = await session.get_one(Job, job_id), await jobs.log_of(session, job_id)
        await store.close()
        return found

    job, log = asyncio.run(read())
    assert [(line.desired, line.observed) for line in log] == [
        ("run", "queued"),
        ("run", "running"),
        ("cancel", "running"),
        ("cancel", "cancelled"),
    ]
    assert jobs.replay(log) == (job.desired, job.observed, job.version)
    assert {line.actor for line in log} == {"key_configured", "test-0"}
    with pytest.raises(ValueError, match="went from running to queued, which no rule allows"):
        jobs.replay([log[1], Transition(job_id=job_id, version=3, desired="run", observed="queued")])


# --- pause and resume ------------------------------------------------------------------------


def status(client: openai.OpenAI, job_id: str) -> str:
    return client.fine_tuning.jobs.retrieve(job_id).status


def told(client: openai.OpenAI, job_id: str) -> list[str]:
    """Returns the messages of the job's events, the oldest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def succeed(client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str, attempt: int) -> None:
    assert list(ray.jobs)[-1] == f"{job_id}-{attempt}"
    spool(settings, job_id, attempt, reports(settings, job_id))
    ray.jobs[f"{job_id}-{attempt}"] = "SUCCEEDED"
    ticks(settings, 2)
    assert status(client, job_id) == "succeeded"


def cancelled(client: openai.OpenAI, settings: Settings, job_id: str) -> None:
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)
    assert status(client, job_id) == "cancelled"


def test_a_queued_job_is_paused_resumed_and_cancelled_at_once(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    jobs = client.fine_tuning.jobs
    with pytest.raises(openai.BadRequestError, match="is queued; only a paused job can be resumed"):
        jobs.resume(job_id)
    assert jobs.pause(job_id).status == "paused"
    with pytest.raises(openai.BadRequestError, match="is paused; only a queued or a running job can be paused"):
        jobs.pause(job_id)
    ticks(settings, 3)
    assert not ray.submissions
    assert jobs.resume(job_id).status == "queued"
    assert jobs.pause(job_id).status == "paused"
    assert jobs.cancel(job_id).status == "cancelled"
    for wish in (jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError, match="is cancelled; only"):
            wish(job_id)


def test_a_running_job_is_paused_when_its_attempt_is_and_another_attempt_goes_on(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str, base_url: str
) -> None:
    ticks(settings, 1)
    with pytest.raises(openai.BadRequestError, match="is running; only a paused job can be resumed"):
        client.fine_tuning.jobs.resume(job_id)
    token = ray.submissions[0]["runtime_env"]["env_vars"]["RAYDPO_ATTEMPT_TOKEN"]
    url, bearer = f"{base_url}/internal/attempts/{job_id}/1/events", {"Authorization": f"Bearer {token}"}
    assert httpx.post(url, json={"events": []}, headers=bearer).json() == {"desired": "run"}
    assert client.fine_tuning.jobs.pause(job_id).status == "running"
    assert client.fine_tuning.jobs.pause(job_id).status == "running", "wishing it twice is as wishing it once"
    assert httpx.post(url, json={"events": []}, headers=bearer).json() == {"desired": "pause"}
    ticks(settings, 2)
    assert status(client, job_id) == "running"
    assert ray.jobs[f"{job_id}-1"] == "RUNNING"

    paused = reports(settings, job_id, steps=2)[:3]
    spool(settings, job_id, 1, [*paused, Paused(step=2)])
    ray.jobs[f"{job_id}-1"] = "FAILED"  # Ray's word for a status that is not 0
    ticks(settings, 4)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.finished_at, job.estimated_finish, len(ray.submissions)) == ("paused", None, None, 1)
    assert client.fine_tuning.jobs.resume(job_id).status == "queued"
    ticks(settings, 1)
    assert status(client, job_id) == "running"
    succeed(client, settings, ray, job_id, 2)
    sentences = ["Pause requested", "The job is paused after step 2", "Resumption requested", "The job is queued again"]
    assert [message for message in told(client, job_id) if message in sentences] == sentences


def test_a_pause_that_comes_too_late_changes_nothing(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    client.fine_tuning.jobs.pause(job_id)
    succeed(client, settings, ray, job_id, 1)
    with pytest.raises(openai.BadRequestError, match="is succeeded; only a paused job can be resumed"):
        client.fine_tuning.jobs.resume(job_id)


@pytest.mark.slow
def test_a_pause_that_is_withdrawn_leaves_the_attempt_running_or_is_followed_by_another(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    client.fine_tuning.jobs.pause(job_id)
    client.fine_tuning.jobs.resume(job_id)
    ticks(settings, 2)
    assert (status(client, job_id), len(ray.submissions)) == ("running", 1)
    for number in range(1, 6):  # as often as it is told to stop, by whomever: none of them is a failure
        spool(settings, job_id, number, [Paused(step=number)])
        ray.jobs[f"{job_id}-{number}"] = "FAILED"
        ticks(settings, 3)
        assert list(ray.jobs)[-1] == f"{job_id}-{number + 1}"
    assert "The service stopped attempt 1 of the job after step 1" in told(client, job_id)
    succeed(client, settings, ray, job_id, 6)


@pytest.mark.slow
def test_an_attempt_that_dies_while_a_pause_is_wished_has_not_failed(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    for number in range(1, 6):  # more often than attempts may fail
        ticks(settings, 1)
        client.fine_tuning.jobs.pause(job_id)
        ray.jobs[f"{job_id}-{number}"] = "FAILED"
        ticks(settings, 2)
        assert status(client, job_id) == "paused"
        client.fine_tuning.jobs.resume(job_id)
    ticks(settings, 1)
    succeed(client, settings, ray, job_id, 6)


@pytest.mark.slow
def test_an_attempt_that_does_not_pause_in_time_is_stopped_by_ray(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    client.fine_tuning.jobs.pause(job_id)
    ticks(settings, 70, apart=8.0)
    assert ray.jobs[f"{job_id}-1"] == "RUNNING"
    ticks(settings, 80, apart=8.0)
    assert (status(client, job_id), ray.jobs[f"{job_id}-1"]) == ("paused", "STOPPED")
    assert (
        "The service is stopping attempt 1 of the job: the job was asked to pause and did not pause in time"
    ) in told(client, job_id)
    cancelled(client, settings, job_id)


# --- attempts that hang ----------------------------------------------------------------------


def silence(settings: Settings, job_id: str, seconds: float = 3600) -> None:
    """Moves the attempt's last report `seconds` into the past."""

    async def run() -> None:
        store = Store(settings.database_url)
        async with store.begin() as session:
            heard = func.now() - timedelta(seconds=seconds)
            await session.execute(update(Attempt).where(Attempt.job_id == job_id).values(reported_at=heard))
        await store.close()

    asyncio.run(run())


@pytest.mark.slow
def test_a_silent_attempt_is_stopped_and_the_next_one_goes_on(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    silence(settings, job_id)
    ticks(settings, 45, apart=8.0)
    assert list(ray.jobs.values()) == ["STOPPED", "RUNNING"]
    stopped = [message for message in told(client, job_id) if "The service is stopping attempt" in message]
    assert len(stopped) == 1
    assert stopped[0].startswith(
        "The service is stopping attempt 1 of the job: its training process sent no report for 36"
    )
    succeed(client, settings, ray, job_id, 2)


@pytest.mark.slow
def test_silence_counts_only_while_a_control_plane_watched_and_ray_said_that_it_runs(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    silence(settings, job_id)
    ticks(settings, 35, apart=8.0)  # a control plane that came back and watched for less than five minutes
    ticks(settings, 45, apart=11.0)  # one that was away again and again
    ray.jobs[f"{job_id}-1"] = "PENDING"
    ticks(settings, 45, apart=8.0)
    ray.jobs[f"{job_id}-1"] = "RUNNING"
    ticks(settings, 35, apart=8.0)
    assert list(ray.jobs.values()) == ["RUNNING"]
    cancelled(client, settings, job_id)


@pytest.mark.slow
def test_an_attempt_that_cannot_post_but_beats_in_its_spool_is_alive(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    silence(settings, job_id)
    spool(settings, job_id, 1, [Alive()])
    ticks(settings, 45, apart=8.0)
    assert list(ray.jobs.values()) == ["RUNNING"]
    silence(settings, job_id)  # and what was read before is no sign of life
    ticks(settings, 45, apart=8.0)
    assert list(ray.jobs.values()) == ["STOPPED", "RUNNING"]
    cancelled(client, settings, job_id)


# --- damaged spools ------------------------------------------------------------------------------


def flip(settings: Settings, job_id: str, attempt: int, first: int) -> None:
    """Changes a digit in a stored file of reports, so that its sha256 is wrong."""
    uri = segment_uri(storage.join(settings.storage_url, "runs", job_id), attempt, first)
    data = storage.read_bytes(uri)
    assert b'"loss":0.5' in data
    storage.write_bytes(uri, data.replace(b'"loss":0.5', b'"loss":0.4'))


def test_reports_whose_bits_flipped_are_not_told_and_those_after_them_are(
    client: openai.OpenAI, settings: Settings, ray: FakeRay, job_id: str
) -> None:
    ticks(settings, 1)
    all_reports = reports(settings, job_id)
    spool(settings, job_id, 1, all_reports[:2])
    spool(settings, job_id, 1, all_reports[2:3], first=2)
    spool(settings, job_id, 1, all_reports[3:], first=3)
    flip(settings, job_id, 1, 2)
    ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
    ticks(settings, 2)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"
    events = list(client.fine_tuning.jobs.list_events(job_id))
    assert [event.data["step"] for event in events if event.type == "metrics"] == [3, 1]  # type: ignore[index]
    (warning,) = [event.message for event in events if event.level == "warn"]
    assert warning == (
        "Reports 2 to 2 of attempt 1 are lost, "
        "so events or metrics are missing: the file that kept these reports in storage is damaged"
    )

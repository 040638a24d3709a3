"""Tests what the regular cleanup removes of deleted jobs and of jobs that ended long ago."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import psycopg
import pytest

from services import storage
from services.control_plane.core.store import Store
from services.control_plane.jobs.deletion import clearing
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import stored
from tests.services.control_plane.jobs.deletion.conftest import (
    ALL,
    NUM_STEPS,
    OF_MODELS,
    OF_USERS,
    Train,
    checkpoint_of,
    left,
    policy_of,
    run_uri,
)
from tests.services.control_plane.steps import pack_all
from tests.services.control_plane.test_cleanup import sweep
from tests.services.s3 import S3

pytestmark = pytest.mark.usefixtures("no_cleanup")


@pytest.fixture(scope="module", params=["local", "s3"])
def storage_url(request: pytest.FixtureRequest, s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> str:
    return s3_server.new_folder() if request.param == "s3" else tmp_path_factory.mktemp("storage").as_uri()


@pytest.fixture
def rows(settings: Settings) -> Iterator[psycopg.Connection]:
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        yield connection


TABLES = ("events", "step_blocks", "transitions", "attempts", "checkpoints", "models")


def counts(rows: psycopg.Connection, job_id: str) -> dict[str, int]:
    """Returns how many rows each table has of the job, without the tables that have none."""
    found = {"jobs": rows.execute("SELECT count(*) FROM jobs WHERE id = %s", [job_id]).fetchone()}
    for table in TABLES:
        found[table] = rows.execute(f"SELECT count(*) FROM {table} WHERE job_id = %s", [job_id]).fetchone()
    return {table: row[0] for table, row in found.items() if row and row[0]}


def a_day_later(rows: psycopg.Connection, job_id: str) -> None:
    rows.execute("UPDATE jobs SET deleted_at = now() - interval '25 hours' WHERE id = %s", [job_id])


def test_of_a_deleted_job_only_its_models_stay_and_then_nothing(
    train: Train, client: openai.OpenAI, api: httpx.Client, settings: Settings, rows: psycopg.Connection
) -> None:
    job_id, other = train(), train()
    pack_all(settings.database_url)
    assert counts(rows, job_id)["step_blocks"] == 1
    api.delete(f"/x/jobs/{job_id}")
    a_day_later(rows, job_id)
    for _ in range(2):
        sweep(settings)
        assert left(settings, job_id) == sorted(OF_MODELS)
        assert counts(rows, job_id).keys() == {"jobs", "transitions", "attempts", "checkpoints", "models"}
    client.models.delete(checkpoint_of(job_id))
    sweep(settings)
    assert left(settings, job_id) == ["export/model.safetensors"]
    client.models.delete(policy_of(job_id))
    storage.write_bytes(storage.join(run_uri(settings, job_id), "logs", "late"), b"")
    sweep(settings)  # the models' files are known to be gone
    sweep(settings)
    assert counts(rows, job_id) == {}
    assert left(settings, job_id) == []
    results = stored(settings, "files")
    assert f"file-{other}" in results
    assert f"file-{job_id}" not in results
    assert left(settings, other) == ALL
    assert counts(rows, other)["models"] == 2


def test_rows_of_attempts_stay_for_a_day(
    train: Train, api: httpx.Client, settings: Settings, rows: psycopg.Connection
) -> None:
    """They count for the share of the project, and let the service stop what still runs on the cluster."""
    job_id = train()
    api.delete(f"/x/jobs/{job_id}", params={"models": True})
    for _ in range(2):
        sweep(settings)
        assert counts(rows, job_id).keys() == {"jobs", "transitions", "attempts", "checkpoints", "models"}
    assert left(settings, job_id) == []
    a_day_later(rows, job_id)
    sweep(settings)
    assert counts(rows, job_id) == {}


class Death(BaseException):
    """The death of a process, which no code catches."""


def dying(settings: Settings, monkeypatch: pytest.MonkeyPatch, after: int) -> bool:
    """Cleans up as a control plane does that dies at its action number `after`: a commit, or a removal from storage.
    Returns whether there was such an action."""
    actions = iter(range(1, 1000))

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **options: Any) -> Any:
            if next(actions) == after:
                raise Death
            return work(*args, **options)

        return act

    async def run() -> None:
        store = Store(settings.database_url)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "delete", counted(storage.delete))
            patch.setattr(store, "begin", counted(store.begin))
            try:
                await clearing.clear(store, settings, 100)
                await clearing.forget(store, settings, 100)
            finally:
                await store.close()

    try:
        asyncio.run(run())
    except Death:
        return True
    return False


@pytest.mark.slow
def test_a_control_plane_that_dies_while_it_removes_a_job_leaves_nothing_behind(
    train: Train,
    api: httpx.Client,
    settings: Settings,
    rows: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died, after = True, 0
    while died:
        after += 1
        job_id = train()
        api.delete(f"/x/jobs/{job_id}")
        rows.execute("UPDATE models SET deleted_at = now(), removed_at = now() WHERE job_id = %s", [job_id])
        a_day_later(rows, job_id)
        died = dying(settings, monkeypatch, after)
        assert not dying(settings, monkeypatch, 0)
        assert (counts(rows, job_id), left(settings, job_id)) == ({}, [])
    assert after > 5


def test_of_a_job_that_ended_long_ago_only_what_users_look_at_stays_and_an_event_tells_it(
    train: Train, client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    old, new = train(), train()
    rows.execute("UPDATE jobs SET finished_at = now() - interval '8 days' WHERE id = %s", [old])
    sweep(settings.model_copy(update={"run_files_days": 0}))
    assert left(settings, old) == ALL
    for _ in range(2):
        sweep(settings)
        assert left(settings, old) == sorted((*OF_MODELS, *OF_USERS))
        events = client.fine_tuning.jobs.list_events(old, limit=100).data
        told = [event.message for event in events if event.message.startswith("Removed from storage, 7 days after")]
        assert len(told) == 1
        assert len([event for event in events if event.type == "metrics"]) == NUM_STEPS
    assert left(settings, new) == ALL
    assert len(client.fine_tuning.jobs.checkpoints.list(old).data) == 1


def test_a_job_that_was_cleared_before_is_removed_when_it_is_deleted(
    train: Train, api: httpx.Client, settings: Settings, rows: psycopg.Connection
) -> None:
    job_id = train()
    rows.execute("UPDATE jobs SET finished_at = now() - interval '8 days' WHERE id = %s", [job_id])
    sweep(settings)
    api.delete(f"/x/jobs/{job_id}", params={"models": True})
    sweep(settings)
    assert left(settings, job_id) == []


def test_files_that_cannot_be_removed_keep_no_other_job(
    train: Train,
    api: httpx.Client,
    settings: Settings,
    rows: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stuck, free = train(), train()
    delete = storage.delete

    def refuse(uri: str) -> None:
        if stuck in uri:
            raise OSError("refused")
        delete(uri)

    monkeypatch.setattr(storage, "delete", refuse)
    for job_id in (stuck, free):
        api.delete(f"/x/jobs/{job_id}", params={"models": True})
        a_day_later(rows, job_id)
    sweep(settings)
    sweep(settings)
    assert left(settings, stuck)
    assert counts(rows, stuck)["jobs"] == 1
    assert (counts(rows, free), left(settings, free)) == ({}, [])


@pytest.mark.parametrize("change", ["options", "place"])
def test_models_stay_if_the_setting_of_the_storage_has_changed(
    train: Train,
    settings: Settings,
    rows: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
    change: str,
) -> None:
    job_id = train()
    rows.execute("UPDATE jobs SET finished_at = now() - interval '8 days' WHERE id = %s", [job_id])
    if change == "options":
        rows.execute(
            "UPDATE models SET source = split_part(source, '?', 1) || '?retry_mode=1' WHERE job_id = %s", [job_id]
        )
    else:
        rows.execute("UPDATE models SET source = '/elsewhere' || source WHERE job_id = %s", [job_id])
    sweep(settings)
    if change == "options":
        assert left(settings, job_id) == sorted((*OF_MODELS, *OF_USERS))
    else:
        assert left(settings, job_id) == ALL
        assert f"The files of the job {job_id} stay in storage" in caplog.text


def test_jobs_are_deleted_at_a_given_age_but_no_models_and_no_job_of_a_sweep_or_of_rounds(
    train: Train, client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    old, new, of_sweep, of_rounds = (train() for _ in range(4))
    aged = "UPDATE jobs SET finished_at = now() - interval '91 days' WHERE id = ANY(%s)"
    rows.execute(aged, [[old, of_sweep, of_rounds]])
    rows.execute(
        "INSERT INTO sweeps (id, project_id, key_id, spec, state, num_trials, finished_at)"
        " VALUES (%s, 'proj_default', 'k', '{}', 'cancelled', 1, now())",
        [of_sweep],
    )
    rows.execute(
        "INSERT INTO sweep_trials (sweep_id, number, parameters, state, job_id, evaluations, results)"
        " VALUES (%s, 0, '{}', 'cancelled', %s, '{}', '{}')",
        [of_sweep, of_sweep],
    )
    rows.execute(
        "INSERT INTO rounds (id, project_id, key_id, spec, prompts, state, history, finished_at)"
        " VALUES (%s, 'proj_default', 'k', '{}', '{}', 'cancelled',"
        " jsonb_build_array(jsonb_build_object('job', %s::text)), now())",
        [of_rounds, of_rounds],
    )
    sweep(settings)
    assert client.fine_tuning.jobs.retrieve(old).id == old  # the default is for ever
    sweep(settings.model_copy(update={"job_days": 90}))
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(old)
    assert left(settings, old) == sorted(OF_MODELS)
    assert client.models.retrieve(policy_of(old)).id == policy_of(old)
    for job_id in (new, of_sweep, of_rounds):
        assert client.fine_tuning.jobs.retrieve(job_id).id == job_id

"""Tests that everything goes that a deleted project owns, and nothing else."""

import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psycopg
import pytest

from services import storage
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import EVERY_SCOPE, SUCCEEDED, api_of, new_key, new_project, pairs, stored
from tests.services.control_plane.test_cleanup import sweep
from tests.services.s3 import S3

pytestmark = pytest.mark.usefixtures("no_cleanup")

VOTE = {"prompt": "Hello?", "completions": [{"completion": "Hi!"}, {"completion": "No."}], "choice": 0}
EVALUATION = {"kind": "score", "model": "tiny", "judge": {"type": "length"}, "rows": [{"prompt": "Hello?"}]}
TABLES = {
    "files": "deleted_at IS NULL",
    "jobs": "true",
    "models": "true",
    "evaluations": "true",
    "sweeps": "true",
    "feedback": "true",
    "webhook_endpoints": "true",
    "keys": "true",
    "uploads": "state = 'pending'",
    "checkpoint_permissions": "true",
}


@pytest.fixture(scope="module", params=["local", "s3"])
def storage_url(request: pytest.FixtureRequest, s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> str:
    return s3_server.new_folder() if request.param == "s3" else tmp_path_factory.mktemp("storage").as_uri()


@pytest.fixture
def rows(settings: Settings) -> Iterator[psycopg.Connection]:
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        yield connection


class Tenant:
    """A project with a file, a job, a model, a sweep, an evaluation, a vote, an endpoint, an upload and a key."""

    def __init__(self, api: httpx.Client, base_url: str, settings: Settings, rows: psycopg.Connection):
        self.rows = rows
        self.id = new_project(api, name := f"tenant-{secrets.token_hex(4)}")
        self.key = new_key(api, project_id=self.id, scopes=EVERY_SCOPE)["value"]
        with openai.OpenAI(base_url=f"{base_url}/v1", api_key=self.key, max_retries=0) as client:
            self.file_id = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id
            job: Any = {"model": "tiny", "training_file": self.file_id, "method": {"type": "dpo"}}
            self.job_id = client.fine_tuning.jobs.create(**job).id
            client.fine_tuning.jobs.cancel(self.job_id)
            client.uploads.create(filename="a", purpose="fine-tune", bytes=2, mime_type="text/plain")
        with api_of(base_url, self.key) as own:
            made = [
                own.post("/x/feedback", json=VOTE),
                own.post("/x/evaluations", json=EVALUATION),
                own.post(
                    "/webhook_endpoints",
                    json={"name": "a", "url": "https://example.com/", "event_types": [SUCCEEDED]},
                ),
            ]
            assert [answer.status_code for answer in made] == [200] * 3, [answer.text for answer in made]
            own.post(f"/x/evaluations/{made[1].json()['id']}/cancel")
        self.model_id = f"ft:tiny:raydpo::{self.job_id.removeprefix('ftjob-')}"
        self.folder = storage.join(settings.storage_url, "runs", self.job_id)
        self.prepared = storage.join(settings.storage_url, "prepared", self.id)
        for uri in (storage.join(self.folder, "export"), storage.join(self.folder, "logs"), self.prepared):
            storage.write_bytes(storage.join(uri, "part"), b"{}")
        rows.execute(
            "INSERT INTO models (id, project_id, source, root, job_id) VALUES (%s, %s, %s, 'tiny', %s)",
            [self.model_id, self.id, storage.join(self.folder, "export"), self.job_id],
        )
        rows.execute(
            "INSERT INTO sweeps (id, project_id, key_id, spec, state, num_trials, finished_at)"
            " VALUES (%s, %s, 'k', '{}', 'cancelled', 1, now())",
            [f"sweep-{name}", self.id],
        )
        rows.execute(
            "INSERT INTO sweep_trials (sweep_id, number, parameters, state, job_id, evaluations, results)"
            " VALUES (%s, 0, '{}', 'cancelled', %s, '{}', '{}')",
            [f"sweep-{name}", self.job_id],
        )

    def owned(self) -> dict[str, int]:
        """Returns how many rows of the project each table has, without the tables that have none."""
        found = {}
        for table, condition in TABLES.items():
            query = f"SELECT count(*) FROM {table} WHERE project_id = %s AND {condition}"
            row = self.rows.execute(query, [self.id]).fetchone()
            assert row is not None
            found[table] = row[0]
        return {table: number for table, number in found.items() if number}

    def is_erased(self) -> bool:
        return self.rows.execute("SELECT erased_at IS NOT NULL FROM projects WHERE id = %s", [self.id]).fetchone() == (
            True,
        )

    def pass_a_day(self) -> None:
        self.rows.execute("UPDATE projects SET deleted_at = now() - interval '25 hours' WHERE id = %s", [self.id])
        self.rows.execute("UPDATE jobs SET deleted_at = now() - interval '25 hours' WHERE deleted_at IS NOT NULL")

    def left(self) -> list[str]:
        return [name for uri in (self.folder, self.prepared) for name, _, _ in storage.list_tree(uri)]


def delete(api: httpx.Client, project_id: str) -> None:
    assert api.post(f"/x/projects/{project_id}/archive").status_code == 200
    answer = api.delete(f"/x/projects/{project_id}")
    assert answer.json() == {"id": project_id, "object": "project", "deleted": True}


def test_a_deleted_project_goes_with_everything_that_it_owns(
    api: httpx.Client, base_url: str, settings: Settings, rows: psycopg.Connection
) -> None:
    gone, other = (Tenant(api, base_url, settings, rows) for _ in range(2))
    before = other.owned(), other.left()
    assert len(before[0]) == len(TABLES) - 1  # nobody shares a model with it
    rows.execute(
        "INSERT INTO checkpoint_permissions (id, model_id, project_id) VALUES ('a' || %s, %s, %s), ('b' || %s, %s, %s)",
        [gone.id, other.model_id, gone.id, gone.id, gone.model_id, other.id],
    )
    delete(api, gone.id)
    for _ in range(2):  # the next one lets uploads expire
        sweep(settings)
    assert gone.owned().keys() == {"jobs", "models"}  # marked as deleted, and their rows stay for a day
    assert not gone.is_erased()
    gone.pass_a_day()
    sweep(settings)
    sweep(settings)
    assert gone.owned() == {}
    assert gone.left() == []
    assert gone.file_id not in stored(settings, "files")
    assert gone.is_erased()
    assert (other.owned(), other.left()) == before
    assert other.file_id in stored(settings, "files")
    entries = api.get("/x/audit", params={"project_id": gone.id}).json()["data"]
    assert "POST /v1/fine_tuning/jobs" in {entry["action"] for entry in entries}


def test_a_model_that_another_project_needs_goes_when_it_is_needed_no_more(
    api: httpx.Client, base_url: str, client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    gone = Tenant(api, base_url, settings, rows)
    rows.execute(
        "INSERT INTO checkpoint_permissions (id, model_id, project_id) VALUES ('c' || %s, %s, 'proj_default')",
        [gone.id, gone.model_id],
    )
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    job: Any = {"model": gone.model_id, "training_file": file.id, "method": {"type": "dpo"}}
    job_id = client.fine_tuning.jobs.create(**job).id
    delete(api, gone.id)
    sweep(settings)
    gone.pass_a_day()
    sweep(settings)
    assert gone.owned()["models"] == 1
    assert gone.left() == ["export/part"]
    assert not gone.is_erased()
    client.fine_tuning.jobs.cancel(job_id)
    for _ in range(3):
        sweep(settings)
    assert gone.owned() == {}
    assert gone.left() == []
    assert gone.is_erased()


def test_a_project_is_not_marked_as_erased_while_its_prepared_data_cannot_be_removed(
    api: httpx.Client, base_url: str, settings: Settings, rows: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Tenant(api, base_url, settings, rows)
    delete(api, gone.id)
    remove = storage.delete

    def refuse(uri: str) -> None:
        if uri == gone.prepared:
            raise OSError("refused")
        remove(uri)

    gone.pass_a_day()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", refuse)
        for _ in range(2):
            sweep(settings)
    assert gone.left() == ["part"]
    assert not gone.is_erased()
    sweep(settings)
    assert gone.left() == []
    assert gone.is_erased()

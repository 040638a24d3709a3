"""Tests the sharing of models with OpenAI's client: who sees a shared model, who may change it, and for how long."""

from collections.abc import Iterator
from typing import Any

import openai
import psycopg
import pytest

from services.control_plane.auth.keys import digest
from services.control_plane.settings import Settings
from tests.clients import strict
from tests.services.control_plane.conftest import API_KEY, pairs

PLAIN, SLASHED = "ft:tiny:raydpo:mine:12345678", "ft:org/base:raydpo::87654321:ckpt-step-3"
OTHERS = ("proj_other", "proj_third")


@pytest.fixture(scope="module")
def projects(base_url: str, settings: Settings) -> None:
    with psycopg.connect(settings.database_url) as connection:
        for name in (*OTHERS, *(f"proj_{number}" for number in range(30))):
            connection.execute("INSERT INTO projects (id, name) VALUES (%s, %s)", (name, name))
        for name in OTHERS:
            key = (f"key_{name}", name, name, digest(f"rd-{name}"), "ther", ["read", "write", "inference", "admin"])
            columns = "id, project_id, name, sha256, hint, scopes"
            connection.execute(f"INSERT INTO keys ({columns}) VALUES (%s, %s, %s, %s, %s, %s)", key)
        connection.execute("INSERT INTO projects (id, name, archived_at) VALUES ('proj_gone', 'gone', now())")


def client_of(base_url: str, key: str) -> openai.OpenAI:
    return strict.OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def other(base_url: str, projects: None) -> Iterator[openai.OpenAI]:
    with client_of(base_url, "rd-proj_other") as client:
        yield client


@pytest.fixture(scope="module")
def third(base_url: str, projects: None) -> Iterator[openai.OpenAI]:
    with client_of(base_url, "rd-proj_third") as client:
        yield client


@pytest.fixture
def owner(base_url: str, settings: Settings, projects: None) -> Iterator[openai.OpenAI]:
    """Returns a client of the project that has two models."""
    with client_of(base_url, API_KEY) as client:
        file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})
        client.fine_tuning.jobs.cancel(job.id)
        with psycopg.connect(settings.database_url) as connection:
            connection.execute("DELETE FROM checkpoint_permissions")
            connection.execute("DELETE FROM models")
            for name in (PLAIN, SLASHED):
                row = (name, "file:///nowhere/model", "tiny", job.id, "proj_default")
                connection.execute(
                    "INSERT INTO models (id, source, root, job_id, project_id) VALUES (%s, %s, %s, %s, %s)", row
                )
        yield client


def permissions(client: openai.OpenAI) -> Any:
    return client.fine_tuning.checkpoints.permissions


def names(client: openai.OpenAI) -> set[str]:
    return {model.id for model in client.models.list()} - {"tiny"}


@pytest.mark.parametrize("model", [PLAIN, SLASHED])
def test_a_shared_model_is_seen_used_and_started_from_but_not_changed(
    owner: openai.OpenAI, other: openai.OpenAI, third: openai.OpenAI, model: str
) -> None:
    assert names(other) == set()
    (granted,) = permissions(owner).create(model, project_ids=["proj_other"])
    assert (granted.object, granted.project_id) == ("checkpoint.permission", "proj_other")
    assert names(other) == {model}
    assert names(third) == set()
    assert other.models.retrieve(model).id == model
    with pytest.raises(openai.InternalServerError, match="cluster does not answer"):  # found, though not served here
        other.completions.create(model=model, prompt="Hi")
    with pytest.raises(openai.NotFoundError):
        third.completions.create(model=model, prompt="Hi")
    file = other.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    job = other.fine_tuning.jobs.create(model=model, training_file=file.id, method={"type": "dpo"})
    assert job.model == model

    for call in (
        lambda: other.models.delete(model),
        lambda: permissions(other).list(model),
        lambda: permissions(other).create(model, project_ids=["proj_third"]),
        lambda: permissions(other).delete(granted.id, fine_tuned_model_checkpoint=model),
    ):
        with pytest.raises(openai.PermissionDeniedError, match=r"belongs to another project\. Only that project"):
            call()
    for call in (lambda: third.models.retrieve(model), lambda: permissions(third).list(model)):
        with pytest.raises(openai.NotFoundError):
            call()

    with pytest.raises(openai.BadRequestError, match="a job of a project that shares the model"):
        owner.models.delete(model)
    assert permissions(owner).delete(granted.id, fine_tuned_model_checkpoint=model).deleted
    assert names(other) == set()
    other.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.NotFoundError, match=granted.id):
        permissions(owner).delete(granted.id, fine_tuned_model_checkpoint=model)


def test_deleting_the_model_ends_its_permissions(
    owner: openai.OpenAI, other: openai.OpenAI, settings: Settings
) -> None:
    permissions(owner).create(PLAIN, project_ids=list(OTHERS))
    owner.models.delete(PLAIN)
    assert names(other) == set()
    with psycopg.connect(settings.database_url) as connection:
        assert connection.execute("SELECT count(*) FROM checkpoint_permissions").fetchone() == (0,)
    with pytest.raises(openai.NotFoundError):
        permissions(owner).list(PLAIN)


def test_granting_again_changes_nothing(owner: openai.OpenAI) -> None:
    first = permissions(owner).create(PLAIN, project_ids=["proj_other", "proj_other"]).data
    both = permissions(owner).create(PLAIN, project_ids=["proj_third", "proj_other"]).data
    assert len(first) == 1
    assert [permission.project_id for permission in both] == ["proj_other", "proj_third"]
    assert both[0] == first[0]
    assert [permission.id for permission in permissions(owner).list(PLAIN, project_id="proj_third")] == [both[1].id]
    with pytest.warns(DeprecationWarning, match="paginated list method"):
        assert len(permissions(owner).retrieve(PLAIN).data) == 2


@pytest.mark.parametrize(
    ("model", "project_ids", "status", "param"),
    [
        (PLAIN, ["proj_other", "proj_none"], 400, "project_ids"),
        (PLAIN, ["proj_gone"], 400, "project_ids"),
        (PLAIN, ["proj_default"], 400, "project_ids"),
        (PLAIN, [], 400, "project_ids"),
        ("tiny", ["proj_other"], 403, "model"),
        ("ft:tiny:raydpo::none", ["proj_other"], 404, "model"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_nothing_is_granted(
    owner: openai.OpenAI, model: str, project_ids: list[str], status: int, param: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        permissions(owner).create(model, project_ids=project_ids)
    assert (refused.value.status_code, refused.value.param) == (status, param)
    assert list(permissions(owner).list(PLAIN)) == []

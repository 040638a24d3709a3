"""Tests /v1/models, and completions without a cluster. The models' files are on S3."""

from collections.abc import Iterator

import httpx
import openai
import psycopg
import pytest

from services import storage
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pairs
from tests.services.control_plane.test_cleanup import sweep
from tests.services.s3 import S3


@pytest.fixture(scope="module")
def storage_url(s3_server: S3) -> str:
    return s3_server.new_folder()


@pytest.fixture
def rows(settings: Settings) -> Iterator[psycopg.Connection]:
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        yield connection


def test_base_models_are_listed_and_stay(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.PermissionDeniedError, match="base model"):
        client.models.delete("tiny")


@pytest.mark.slow
def test_while_storage_does_not_answer_requests_are_to_be_sent_again(client: openai.OpenAI, s3: S3) -> None:
    kept = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    s3.proxy.refusing = True
    s3.proxy.cut()
    with pytest.raises(openai.InternalServerError, match="storage does not answer") as refused:
        client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    assert (refused.value.status_code, refused.value.code) == (503, "storage_unavailable")
    s3.proxy.pass_on()
    assert [file.id for file in client.files.list()] == [kept.id]
    assert client.files.content(kept.id).read() == pairs()


def train(rows: psycopg.Connection, settings: Settings, job_id: str) -> list[str]:
    """Adds a paused job with checkpoints of the steps 2 and 10, and returns the names of their models."""
    columns = "id, project_id, spec, model_source, model_root, priority, desired, observed, version"
    values = f"'{job_id}', 'proj_default', '{{\"model\": \"tiny\"}}', '/m', 'tiny', 0, 'pause', 'paused', 1"
    rows.execute(f"INSERT INTO jobs ({columns}) VALUES ({values})")
    names = []
    for step in (2, 10):
        uri = storage.join(settings.storage_url, "runs", job_id, "checkpoints", f"step-{step:06d}")
        storage.write_bytes(storage.join(uri, "model", "model.safetensors"), b"weights")
        names.append(f"ft:tiny:raydpo::{job_id}:ckpt-step-{step}")
        model = (names[-1], storage.join(uri, "model"), job_id)
        rows.execute(
            "INSERT INTO models (id, project_id, source, root, job_id) VALUES (%s, 'proj_default', %s, 'tiny', %s)",
            model,
        )
        checkpoint = (f"{job_id}-{step}", job_id, step, uri, names[-1])
        rows.execute(
            "INSERT INTO checkpoints (id, job_id, step, uri, model_id, metrics) VALUES (%s, %s, %s, %s, %s, '{}')",
            checkpoint,
        )
    return names


def cancel(rows: psycopg.Connection, job_id: str) -> None:
    rows.execute("UPDATE jobs SET observed = 'cancelled', finished_at = now() WHERE id = %s", [job_id])


def source_of(rows: psycopg.Connection, name: str) -> str:
    row = rows.execute("SELECT source FROM models WHERE id = %s", [name]).fetchone()
    assert row is not None
    return str(row[0])


def test_a_deleted_model_takes_its_weights_along(
    client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    names = train(rows, settings, "ftjob-ended")
    cancel(rows, "ftjob-ended")
    for name in names:
        assert client.models.delete(name).deleted
        assert not storage.exists(source_of(rows, name))


@pytest.mark.slow
def test_weights_that_cannot_be_removed_at_once_are_removed_later(
    client: openai.OpenAI, settings: Settings, rows: psycopg.Connection, s3: S3
) -> None:
    name, other = train(rows, settings, "ftjob-distant")
    cancel(rows, "ftjob-distant")
    s3.proxy.refusing = True
    s3.proxy.cut()
    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(name)
    s3.proxy.pass_on()
    assert storage.exists(source_of(rows, name))
    sweep(settings)
    assert not storage.exists(source_of(rows, name))
    assert storage.exists(source_of(rows, other))
    left = "SELECT count(*) FROM models WHERE deleted_at IS NOT NULL AND removed_at IS NULL"
    assert rows.execute(left).fetchone() == (0,)


def test_the_checkpoint_that_a_paused_job_goes_on_from_stays(
    client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    older, newest = train(rows, settings, "ftjob-paused")
    with pytest.raises(openai.BadRequestError, match=r"ftjob-paused has not ended and would resume from .*step-10"):
        client.models.delete(newest)
    assert storage.exists(source_of(rows, newest))
    assert client.models.delete(older).deleted
    cancel(rows, "ftjob-paused")
    assert client.models.delete(newest).deleted


def test_an_unknown_model_is_not_found_wherever_it_is_named(client: openai.OpenAI) -> None:
    name = "ft:org/base:raydpo::12345678"
    with pytest.raises(openai.NotFoundError, match="base model \\(tiny\\)"):
        client.models.retrieve(name)
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}])
    assert refused.value.code == "model_not_found"


def test_without_a_cluster_a_model_is_unavailable_and_says_when_to_come_back(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="cluster does not answer") as refused:
        client.completions.create(model="tiny", prompt="Hi")
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) <= 60


def test_models_are_listed_page_by_page_bases_first_and_the_first_page_is_long(
    client: openai.OpenAI, api: httpx.Client, settings: Settings
) -> None:
    job = {"model": "tiny", "training_file": client.files.create(file=("p.jsonl", pairs()), purpose="fine-tune").id}
    job_id = client.fine_tuning.jobs.create(**job, method={"type": "dpo"}).id
    with psycopg.connect(settings.database_url) as connection:
        connection.execute(
            "INSERT INTO models (id, project_id, source, root, job_id, created_at)"
            " SELECT 'ft:tiny:' || n, 'proj_default', '/m', 'tiny', %s, now() - make_interval(secs => n / 10)"
            " FROM generate_series(1, 1200) n",
            [job_id],
        )
        order = "SELECT id FROM models WHERE deleted_at IS NULL ORDER BY created_at DESC, id DESC"
        expected = ["tiny", *(row[0] for row in connection.execute(order))]
    assert [model.id for model in client.models.list()] == expected[:1000]
    for limit in (1, 500):
        seen, after = list[str](), dict[str, str]()
        while len(seen) < 3 * limit:
            page = api.get("/models", params={"limit": limit, **after}).json()
            seen += [model["id"] for model in page["data"]]
            after = {"after": page["last_id"]}
            if not page["has_more"]:
                break
        assert seen == expected[: 3 * limit]
        assert page["has_more"] is (limit == 1)
    assert api.get("/models", params={"after": "ft:none"}).status_code == 400
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("DELETE FROM models")

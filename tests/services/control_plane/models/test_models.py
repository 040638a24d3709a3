"""Tests /v1/models, and completions without a cluster. The models' files are on S3."""

import asyncio
from collections.abc import Iterator

import openai
import psycopg
import pytest

from dpo_core.config import Lora, TrainConfig
from services import storage
from services.contract import JobSpec, Weights
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Job
from services.control_plane.models import models
from services.control_plane.models.models import NamedModel
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


def test_an_adapter_is_found_as_its_job_trained_it(
    client: openai.OpenAI, settings: Settings, rows: psycopg.Connection
) -> None:
    (name, _) = train(rows, settings, "ftjob-adapter")
    adapter = Lora(r=8, target_modules=("q_proj", "w1"))
    weights = Weights(adapter=adapter, quantization="nf4", on_experts=True)
    spec = JobSpec(model="tiny", training_file="file-1", config=TrainConfig(), weights=weights)
    rows.execute("UPDATE jobs SET spec = %s WHERE id = 'ftjob-adapter'", [spec.model_dump_json()])

    async def added() -> NamedModel:
        store = Store(settings.database_url)
        try:
            async with store.begin() as session:
                await models.add(session, f"{name}:b", "s3://b", await session.get_one(Job, "ftjob-adapter"))
                return await models.find(session, settings, f"{name}:b")
        finally:
            await store.close()

    found = asyncio.run(added())
    assert (found.adapter, found.quantization, found.on_experts, found.base_source) == (adapter, "nf4", True, "/m")
    cancel(rows, "ftjob-adapter")


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


def test_without_a_cluster_a_model_is_unavailable_and_says_when_to_come_back(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="cluster does not answer") as refused:
        client.completions.create(model="tiny", prompt="Hi")
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) <= 60

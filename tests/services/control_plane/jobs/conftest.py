"""Adds models that jobs can start from to the database, although nothing was trained."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import openai
import psycopg
import pytest

from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pairs


@pytest.fixture(scope="module")
def training_file(client: openai.OpenAI) -> str:
    return client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id


@pytest.fixture(scope="module")
def insert_models(client: openai.OpenAI, settings: Settings, training_file: str) -> Iterator[Any]:
    """Returns a function that adds models to the database as if a job had trained them."""
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=training_file, method={"type": "dpo"}).id

    def insert(*models: NamedModel) -> None:
        with psycopg.connect(settings.database_url, autocommit=True) as connection:
            for model in models:
                adapter = asdict(model.adapter) | {"quantization": model.quantization} if model.adapter else None
                values = (
                    model.id, model.source, model.root, job_id, model.base_source,
                    adapter and json.dumps(adapter), model.num_outputs,
                )  # fmt: skip
                connection.execute(
                    "INSERT INTO models (id, project_id, source, root, job_id, base_source, adapter, num_outputs) "
                    "VALUES (%s, 'proj_default', %s, %s, %s, %s, %s, %s)",
                    values,
                )

    yield insert
    client.fine_tuning.jobs.cancel(job_id)

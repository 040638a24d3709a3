"""Makes jobs that have ended, with everything that training leaves, although nothing was trained."""

from collections.abc import Callable

import openai
import psycopg
import pytest

from services import storage
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pairs
from tests.services.control_plane.steps import insert_steps

OF_RUNNING = (
    "attempts/1.json",
    "spool/1/00000000.json",
    "checkpoints/step-000001/manifest.json",
    "checkpoints/step-000001/optimizer.safetensors",
)
OF_MODELS = ("checkpoints/step-000001/model/model.safetensors", "export/model.safetensors")
OF_USERS = ("logs/1/driver/0.log", "tensorboard/events", "wandb/run/file")
ALL = sorted((*OF_RUNNING, *OF_MODELS, *OF_USERS))
NUM_STEPS = 20


def policy_of(job_id: str) -> str:
    return f"ft:tiny:raydpo::{job_id.removeprefix('ftjob-')}"


def checkpoint_of(job_id: str) -> str:
    return f"{policy_of(job_id)}:ckpt-step-1"


def run_uri(settings: Settings, job_id: str) -> str:
    return storage.join(settings.storage_url, "runs", job_id)


def left(settings: Settings, job_id: str) -> list[str]:
    """Returns the paths of all files of the job in storage."""
    return sorted(name for name, _, _ in storage.list_tree(run_uri(settings, job_id)))


Train = Callable[[], str]


@pytest.fixture
def train(client: openai.OpenAI, settings: Settings) -> Train:
    """Returns a function that adds a job that has succeeded, with two models and a result file, and returns its id."""

    def train() -> str:
        file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
        job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"}).id
        uri = run_uri(settings, job_id)
        for name in ALL:
            storage.write_bytes(storage.join(uri, *name.split("/")), b"{}")
        results = f"file-{job_id}"
        storage.write_bytes(storage.join(settings.storage_url, "files", results), b"step\n")
        insert_steps(settings.database_url, job_id, range(1, NUM_STEPS + 1))
        checkpoint = storage.join(uri, "checkpoints", "step-000001")
        models = {policy_of(job_id): "export", checkpoint_of(job_id): "checkpoints/step-000001/model"}
        with psycopg.connect(settings.database_url) as rows:
            rows.execute(
                "INSERT INTO attempts (job_id, number, state, token, next_seq, num_accelerators, failed, ended_at)"
                " VALUES (%s, 1, 'ended', '', 9, 0, false, now())",
                [job_id],
            )
            for model_id, folder in models.items():
                rows.execute(
                    "INSERT INTO models (id, project_id, source, root, job_id)"
                    " VALUES (%s, 'proj_default', %s, 'tiny', %s)",
                    [model_id, storage.join(uri, *folder.split("/")), job_id],
                )
            rows.execute(
                "INSERT INTO checkpoints (id, job_id, step, uri, model_id, metrics) VALUES (%s, %s, 1, %s, %s, '{}')",
                [f"ftckpt_{job_id}", job_id, checkpoint, checkpoint_of(job_id)],
            )
            rows.execute(
                "INSERT INTO files (id, project_id, filename, purpose, num_bytes, sha256, uri)"
                " VALUES (%s, 'proj_default', 'step_metrics.csv', 'fine-tune-results', 5, '', %s)",
                [results, storage.join(settings.storage_url, "files", results)],
            )
            rows.execute(
                "UPDATE jobs SET observed = 'succeeded', finished_at = now(), fine_tuned_model = %s, result_file = %s,"
                " version = version + 1 WHERE id = %s",
                [policy_of(job_id), results, job_id],
            )
        return job_id

    return train

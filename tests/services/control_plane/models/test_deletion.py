"""Tests what goes with a trained model that is deleted."""

import openai
import psycopg

from services import storage
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pairs


def test_a_model_goes_with_its_files_its_place_and_its_settings(client: openai.OpenAI, settings: Settings) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})
    client.fine_tuning.jobs.cancel(job.id)
    source = storage.join(settings.storage_url, "runs", job.id, "export")
    storage.write_bytes(storage.join(source, "model.safetensors"), b"{}")
    with psycopg.connect(settings.database_url) as rows:
        values = "('ft:gone', 'proj_default', %s, 'tiny', %s)"
        rows.execute(f"INSERT INTO models (id, project_id, source, root, job_id) VALUES {values}", [source, job.id])
        rows.execute("INSERT INTO model_settings (model_id, values) VALUES ('ft:gone', '{}')")
    assert client.models.delete("ft:gone").deleted
    assert storage.list_tree(source) == []
    with psycopg.connect(settings.database_url) as rows:
        assert rows.execute("SELECT count(*) FROM model_settings WHERE model_id = 'ft:gone'").fetchone() == (0,)

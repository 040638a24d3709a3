"""Tests the route that deletes a job."""

import httpx
import openai
import pytest

from services.control_plane.core.store import census
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import EVERY_SCOPE, api_of, new_key, new_project, pairs
from tests.services.control_plane.jobs.deletion.conftest import Train, checkpoint_of, policy_of
from tests.services.control_plane.steps import read


def test_a_deleted_job_is_nowhere_and_its_models_stay(train: Train, client: openai.OpenAI, api: httpx.Client) -> None:
    job_id, other = train(), train()
    answer = api.delete(f"/x/jobs/{job_id}")
    models = sorted([checkpoint_of(job_id), policy_of(job_id)])
    assert answer.json() == {"id": job_id, "object": "fine_tuning.job", "deleted": True, "models": models}
    listed = [job.id for job in client.fine_tuning.jobs.list()]
    assert other in listed
    assert job_id not in listed
    for path in ("", "/events", "/checkpoints"):
        assert api.get(f"/fine_tuning/jobs/{job_id}{path}").json()["error"]["code"] == "fine_tune_not_found"
    for path in ("stream", "metrics", "logs"):
        assert api.get(f"/x/jobs/{job_id}/{path}").status_code == 404
    for wish in ("cancel", "pause", "resume"):
        assert api.post(f"/fine_tuning/jobs/{job_id}/{wish}").status_code == 404
    assert api.delete(f"/x/jobs/{job_id}").status_code == 404
    assert client.models.retrieve(policy_of(job_id)).id == policy_of(job_id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(f"file-{job_id}")  # its result file
    assert client.models.delete(policy_of(job_id)).deleted
    entries = api.get("/x/audit", params={"limit": 20}).json()["data"]
    told = [(entry["action"], entry["status"]) for entry in entries if entry["object_id"] == job_id]
    assert told.count(("DELETE /v1/x/jobs/{job_id}", 200)) == 1


def test_a_job_is_deleted_with_its_models_on_request(train: Train, client: openai.OpenAI, api: httpx.Client) -> None:
    job_id = train()
    assert api.delete(f"/x/jobs/{job_id}", params={"models": True}).json()["models"] == []
    for model_id in (policy_of(job_id), checkpoint_of(job_id)):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(model_id)


def test_a_repeated_request_gets_the_same_answer(train: Train, api: httpx.Client) -> None:
    job_id = train()
    first, again = (api.delete(f"/x/jobs/{job_id}", headers={"x-stainless-retry-count": count}) for count in ("0", "1"))
    assert first.json() == again.json()
    assert again.headers["x-raydpo-deduplicated"] == "true"


def test_other_projects_and_keys_that_only_read_cannot_delete_a_job(
    train: Train, api: httpx.Client, base_url: str
) -> None:
    job_id = train()
    project = new_project(api, "other-of-deletion")
    for wanted, status in (({"project_id": project, "scopes": EVERY_SCOPE}, 404), ({"scopes": ["read"]}, 403)):
        with api_of(base_url, new_key(api, **wanted)["value"]) as others:
            assert others.delete(f"/x/jobs/{job_id}").status_code == status
    assert api.get(f"/fine_tuning/jobs/{job_id}").status_code == 200


def test_a_job_that_has_not_ended_is_refused_with_the_remedy(client: openai.OpenAI, api: httpx.Client) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})
    answer = api.delete(f"/x/jobs/{job.id}")
    assert answer.status_code == 400
    assert "is queued; cancel it before you delete it" in answer.json()["error"]["message"]
    client.fine_tuning.jobs.cancel(job.id)
    assert api.delete(f"/x/jobs/{job.id}").json()["models"] == []


def test_a_deleted_job_does_not_count(train: Train, api: httpx.Client, settings: Settings) -> None:
    def succeeded() -> tuple[int, int]:
        usage = api.get("/x/projects/proj_default/usage").json()
        return usage["jobs"]["succeeded"], read(settings.database_url, census).jobs["succeeded"]

    before, job_id = succeeded(), train()
    assert succeeded() == (before[0] + 1, before[1] + 1)
    api.delete(f"/x/jobs/{job_id}")
    assert succeeded() == before

"""Tests the routes of models."""

from typing import Any

import httpx
import openai
import psycopg
import pytest

from services import storage
from services.control_plane.attempts import reconciler
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import FakeRay, pairs, wait_for


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay) -> Settings:
    return offline.model_copy(update={"ray_url": f"http://127.0.0.1:{fake_ray.server.server_port}"})


def test_base_models_are_listed_and_stay(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.PermissionDeniedError, match="base model"):
        client.models.delete("tiny")


def test_an_unknown_model_is_not_found_wherever_it_is_named(client: openai.OpenAI) -> None:
    name = "ft:org/base:raydpo::12345678"
    with pytest.raises(openai.NotFoundError, match="base model \\(tiny\\)"):
        client.models.retrieve(name)
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}])
    assert refused.value.code == "model_not_found"


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


def test_the_engine_of_the_base_is_told_of_a_deleted_adapter_at_once(
    client: openai.OpenAI, api: httpx.Client, settings: Settings, fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"model": "tiny", "training_file": client.files.create(file=("p.jsonl", pairs()), purpose="fine-tune").id}
    job_id = client.fine_tuning.jobs.create(**job, method={"type": "dpo"}).id
    client.fine_tuning.jobs.cancel(job_id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "cancelled")
    adapters = ["ft:tiny:first", "ft:tiny:second"]
    with psycopg.connect(settings.database_url) as connection:
        for name in adapters:
            source = storage.join(settings.storage_url, "runs", job_id, name[-1])
            connection.execute(
                "INSERT INTO models (id, project_id, source, root, base_source, job_id)"
                " VALUES (%s, 'proj_default', %s, 'tiny', '/nowhere/tiny', %s)",
                [name, source, job_id],
            )
    api.put("/x/deployments/tiny", json={"pinned": True}).raise_for_status()
    wait_for(lambda: fake_ray.serve)
    monkeypatch.setattr(reconciler, "TICK_SECONDS", 3600)  # holds from the deletion of the first adapter on

    def told() -> Any:
        (app,) = fake_ray.serve.values()
        return app["deployed_app_config"]["deployments"][0]["user_config"]["deleted_adapters"]

    for number, name in enumerate(adapters, 1):
        client.models.delete(name)
        wait_for(lambda: told() == adapters[:number])  # noqa: B023 - called before the next turn

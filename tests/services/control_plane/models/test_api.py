"""Tests the routes of models."""

import httpx
import openai
import psycopg
import pytest

from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pairs


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

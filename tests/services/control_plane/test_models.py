"""/v1/models and inference where no cluster answers."""

import openai
import pytest


def test_base_models_are_listed_and_stay(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.PermissionDeniedError, match="base model"):
        client.models.delete("tiny")


def test_an_unknown_model_is_not_found_wherever_it_is_named(client: openai.OpenAI) -> None:
    name = "ft:org/base:raydpo::12345678"
    with pytest.raises(openai.NotFoundError, match="Base models: tiny"):
        client.models.retrieve(name)
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}])
    assert refused.value.code == "model_not_found"


def test_without_a_cluster_a_model_is_unavailable_and_says_when_to_come_back(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="cluster does not answer") as refused:
        client.completions.create(model="tiny", prompt="Hi")
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) <= 60

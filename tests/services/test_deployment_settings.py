"""Tests which settings of a deployment are accepted, and how others are refused."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from services.contract import Deployment
from services.deployment_settings import DeploymentSettings, EngineSettings, Replicas


def test_a_number_of_replicas_is_short_for_as_many_at_least_and_at_most() -> None:
    assert DeploymentSettings.model_validate({"replicas": 3}).replicas == Replicas(min=3, max=3)
    assert DeploymentSettings().replicas == Replicas(min=1, max=1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"replicas": {"min": 2, "max": 1}},
            "replicas.min is 2, which is more than replicas.max, 1; lower min, or raise max",
        ),
        ({"replicas": {"min": 0}}, "greater than or equal to 1"),
        ({"num_gpus": 1.5}, "num_gpus is 1.5; it must be a share below 1 or a whole number"),
        ({"quantization": "awq"}, "'fp8'"),
        ({"tool_call_parser": "none"}, "'hermes'"),
        ({"nonsense": 1}, "not permitted"),
        ({"gpu_memory_utilization": 0}, "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        DeploymentSettings.model_validate(given)
    assert next(iter(given)) in str(refused.value)
    assert said in str(refused.value)


def test_an_engine_is_not_replaced_for_what_only_the_control_plane_reads() -> None:
    pinned = DeploymentSettings(pinned=True, idle_seconds=5, max_model_len=9, prefix_caching=False)
    assert pinned.engine() == EngineSettings(prefix_caching=False)


def test_a_later_release_may_have_more_settings() -> None:
    given = {"app_name": "a", "model_id": "m", "source": "/m", "dtype": "float32"}
    read = Deployment.model_validate(given | {"engine": {"replicas": {"min": 2, "max": 4, "new": 1}, "newer": 1}})
    assert read.engine.replicas == Replicas(min=2, max=4)
    assert read.model_copy(update={"num_gpus": 2.0}).most_gpus == 8


@pytest.mark.parametrize("settings", [DeploymentSettings, Replicas])
def test_every_setting_is_explained(settings: type[BaseModel]) -> None:
    """The OpenAPI document, and so the page, shows these words."""
    assert [name for name, field in settings.model_fields.items() if not field.description] == []

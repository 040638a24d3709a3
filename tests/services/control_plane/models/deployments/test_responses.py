"""Tests the JSON of deployments."""

from dataclasses import replace
from datetime import UTC, datetime

from services import contract
from services.control_plane.models.deployments.deployments import Status
from services.control_plane.models.deployments.responses import deployment_object
from services.control_plane.ray_api import Load
from services.deployment_settings import DeploymentSettings

STATUS = Status(
    "tiny",
    contract.Deployment(app_name="tiny-1", model_id="tiny", source="/models/tiny", dtype="bfloat16", num_gpus=2.0),
    own=DeploymentSettings(max_model_len=64),
    chosen={"max_model_len": 64},
    state="running",
    num_ready=1,
)


def test_the_settings_are_those_in_use_beside_those_that_a_client_chose() -> None:
    told = deployment_object(STATUS, None)
    assert told["chosen"] == {"max_model_len": 64}
    assert told["settings"].items() >= {"max_model_len": 64, "dtype": "bfloat16", "num_gpus": 2.0}.items()
    assert set(told["settings"]) == set(DeploymentSettings.model_fields)
    assert (told["id"], told["state"], told["replicas_ready"]) == ("tiny", "running", 1)


def test_an_unknown_load_is_null_and_an_idle_model_has_a_load_of_zero() -> None:
    names = ("requests_in_flight", "tokens_per_second", "time_to_first_token")
    assert [deployment_object(STATUS, None)[name] for name in names] == [None] * 3
    told = deployment_object(
        STATUS, Load(requests_in_flight=0, tokens_per_second=1.23456, time_to_first_token=0.5, num_replicas=1)
    )
    assert [told[name] for name in names] == [0, 1.235, 0.5]


def test_times_of_use_are_whole_seconds_and_null_where_there_are_none() -> None:
    told = deployment_object(STATUS, None)
    assert (told["last_used_at"], told["unloads_at"]) == (None, None)
    used, unloads = datetime(2026, 1, 1, 0, 0, 1, 900_000, UTC), datetime(2026, 1, 1, 0, 10, tzinfo=UTC)
    told = deployment_object(replace(STATUS, last_used_at=used, unloads_at=unloads), None)
    assert (told["last_used_at"], told["unloads_at"]) == (1767225601, 1767226200)

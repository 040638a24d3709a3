"""Tests `raydpo deployments` against a control plane with a stand-in for Ray."""

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import (  # noqa: F401  # fixtures
    API_KEY,
    FakeRay,
    base_url,
    fake_ray,
    offline,
    storage_url,
)


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay) -> Settings:  # noqa: F811
    ray = {"ray_url": f"http://127.0.0.1:{fake_ray.server.server_port}", "model_wait_seconds": 60.0}
    return offline.model_copy(update=ray)


@pytest.fixture
def raydpo(base_url: str) -> Callable[..., str]:  # noqa: F811
    def run(*arguments: str, status: int = 0) -> str:
        environment = {"RAYDPO_URL": f"{base_url}/v1", "RAYDPO_API_KEY": API_KEY}
        result = CliRunner().invoke(app, arguments, env=environment)
        assert result.exit_code == status, result.output
        return result.output

    return run


def test_a_deployment_is_shown_set_field_by_field_and_reset(raydpo: Callable[..., str]) -> None:
    plain = json.loads(raydpo("deployments", "show", "tiny"))
    raydpo("deployments", "set", "tiny", "replicas=2", "idle_seconds=60")
    changed = json.loads(raydpo("deployments", "set", "tiny", "replicas.max=3", "idle_seconds=null"))
    assert changed["settings"]["replicas"] == {"min": 2, "max": 3, "target_ongoing_requests": 32}
    assert changed["settings"]["idle_seconds"] is None
    assert "write FIELD=VALUE" in raydpo("deployments", "set", "tiny", "replicas", status=1)
    assert json.loads(raydpo("deployments", "reset", "tiny"))["settings"] == plain["settings"]


def test_a_model_is_warmed_listed_and_unloaded(raydpo: Callable[..., str]) -> None:
    told = raydpo("models", "warm", "tiny")
    assert told.splitlines()[-1] == "tiny is loaded"
    assert "tiny is waiting: its turn to be loaded" in told
    assert "running" in raydpo("deployments", "list")
    assert raydpo("models", "unload", "tiny") == "unloaded tiny\n"

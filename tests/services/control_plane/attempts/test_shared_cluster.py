"""Tests a Ray cluster that several services use: each leaves the others' Serve applications alone."""

import asyncio
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest

from dpo_core.config import TrainConfig
from services.contract import Deployment
from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import File
from services.control_plane.files.model_check import check_of
from services.control_plane.models.models import NamedModel
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from services.control_plane.side_jobs import SideJob
from tests.services.control_plane.conftest import FakeRay, served

pytestmark = pytest.mark.slow

FRAUD = {"name": "fraud", "route_prefix": "/", "import_path": "fraud:app", "runtime_env": {"env_vars": {"A": "b"}}}


@pytest.fixture
def ray(fake_ray: FakeRay) -> FakeRay:
    fake_ray.serve, fake_ray.target_capacity = {}, None
    return fake_ray


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay) -> Settings:
    migrate(offline.database_url)
    return offline.model_copy(update={"ray_url": f"http://127.0.0.1:{fake_ray.server.server_port}"})


@pytest.fixture(scope="module")
def neighbour(settings: Settings) -> Iterator[Settings]:
    """Returns the settings of another service on the same cluster, with its own database."""
    name = f"neighbour_{secrets.token_hex(4)}"
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    server, _, _ = settings.database_url.partition("?")
    url = settings.database_url.replace(server, f"{server.rpartition('/')[0]}/{name}")
    migrate(url)
    yield settings.model_copy(update={"database_url": url})
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def serve(settings: Settings, *app_names: str) -> list[str]:
    """Has the service serve these applications and no others, and returns those that it then sees as its own."""

    async def run() -> list[str]:
        store = Store(settings.database_url)
        ray_api = RayApi(settings, store.instance)
        wanted = [Deployment(app_name=name, model_id=name, source="/m", dtype="float32") for name in app_names]
        try:
            await ray_api.serve(wanted)
            return list((await ray_api.look()).applications)
        finally:
            await ray_api.close()
            await store.close()

    return asyncio.run(run())


def test_applications_of_others_are_sent_along_as_they_were_submitted(settings: Settings, ray: FakeRay) -> None:
    ray.serve = {"fraud": served(FRAUD), "search": served(None, source="imperative")}
    ray.target_capacity = 50.0
    assert serve(settings, "tiny-1") == ["tiny-1"]
    assert ray.serve["fraud"] == served(FRAUD)
    assert ray.serve["search"]["source"] == "imperative", "one of serve.run is not taken over"
    assert ray.target_capacity == 50.0
    assert serve(settings) == []
    assert ray.applications == ["search", "fraud"]


def test_nothing_is_changed_while_serve_does_not_tell_what_others_deployed(settings: Settings, ray: FakeRay) -> None:
    ray.serve = {"fraud": served(None)}
    with pytest.raises(httpx.HTTPError, match="'fraud'"):
        serve(settings, "tiny-1")
    assert ray.serve == {"fraud": served(None)}
    ray.serve = {"fraud": served(None, status="DELETING")}
    assert serve(settings, "tiny-1") == ["tiny-1"], "what its owner removes is not waited for"


def test_two_services_serve_the_same_model_and_neither_touches_the_others(
    settings: Settings, neighbour: Settings, ray: FakeRay
) -> None:
    assert serve(settings, "tiny-1") == ["tiny-1"]
    assert serve(neighbour, "tiny-1", "tiny-2") == ["tiny-1", "tiny-2"]
    assert len(ray.applications) == 3
    routes = {app["deployed_app_config"]["route_prefix"] for app in ray.serve.values()}
    assert routes == {f"/{name}" for name in ray.applications}
    assert serve(settings) == []
    assert serve(neighbour, "tiny-1") == ["tiny-1"]
    assert len(ray.applications) == 1


def test_a_service_keeps_its_identity_and_shares_it_with_no_other(settings: Settings, neighbour: Settings) -> None:
    async def instance(url: str) -> str:
        store = Store(url)
        found = await store.instance()
        await store.close()
        return found

    mine, again, other = (asyncio.run(instance(s.database_url)) for s in (settings, settings, neighbour))
    assert mine == again != other


def test_a_check_of_the_same_file_is_another_ray_job_in_another_service(settings: Settings) -> None:
    """With the same Ray job, one service would wait for the other's, whose result is in the other's storage."""
    file: Any = File(id="file-1", sha256="00", uri="file:///f")
    model = NamedModel("tiny", "/m", "tiny", None)  # type: ignore[arg-type]

    def check(instance: str) -> SideJob:
        return check_of(file, model, TrainConfig(), settings, instance)

    assert check("one").submission_id(1) == check("one").submission_id(1)
    assert check("one").submission_id(1) != check("other").submission_id(1)

"""Tests whose settings a model is served with."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.store import Store, migrate
from services.control_plane.models.deployments import settings as deployment_settings
from services.control_plane.settings import BaseModel, Settings
from services.deployment_settings import DeploymentSettings

CONFIGURED = DeploymentSettings(max_model_len=64, pinned=True, idle_seconds=60)


@pytest.fixture(scope="module")
def settings(offline: Settings) -> Settings:
    """Returns the settings of a service with a base model and a policy ft:1 that was trained from it."""
    migrate(offline.database_url)
    columns = "id, project_id, spec, model_source, model_root, priority, desired, observed, version"
    with psycopg.connect(offline.database_url, autocommit=True) as rows:
        values = "'ftjob-1', 'proj_default', '{}', '/m', 'tiny', 0, 'run', 'queued', 1"
        rows.execute(f"INSERT INTO jobs ({columns}) VALUES ({values})")
        values = "'ft:1', 'proj_default', 's3://b/1', 'tiny', 'ftjob-1'"
        rows.execute(f"INSERT INTO models (id, project_id, source, root, job_id) VALUES ({values})")
    return offline.model_copy(update={"models": {"tiny": BaseModel(source="/m", deployment=CONFIGURED)}})


def within(settings: Settings, story: Callable[[AsyncSession], Awaitable[None]]) -> None:
    """Runs the story in a transaction that is rolled back."""

    async def run() -> None:
        store = Store(settings.database_url)
        try:
            async with store.begin() as session:
                await story(session)
                await session.rollback()
        finally:
            await store.close()

    asyncio.run(run())


def test_a_policy_inherits_all_but_replicas_and_its_pin_and_its_own_choice_wins(settings: Settings) -> None:
    async def story(session: AsyncSession) -> None:
        async def of(*names: str) -> list[dict[str, Any]]:
            found = await deployment_settings.of(session, settings, names)
            return [found[name].model_dump(exclude_unset=True) for name in names]

        assert await of("tiny", "ft:1") == [
            {"max_model_len": 64, "pinned": True, "idle_seconds": 60},
            {"max_model_len": 64, "idle_seconds": 60},
        ]
        await deployment_settings.choose(session, "tiny", {"max_model_len": 32, "replicas": 2})
        await deployment_settings.choose(session, "ft:1", {"idle_seconds": 5.0})
        tiny, policy = await of("tiny", "ft:1")
        assert (tiny["max_model_len"], tiny["replicas"]["max"]) == (32, 2)
        assert policy == {"max_model_len": 32, "idle_seconds": 5.0}
        wish = DeploymentSettings(max_model_len=16)
        full = await deployment_settings.with_choice(session, settings, "ft:1", wish)
        assert (full.max_model_len, full.idle_seconds) == (16, 60)  # a choice replaces the choice before it
        await deployment_settings.choose(session, "ft:1", None)
        assert await of("ft:1") == [{"max_model_len": 32, "idle_seconds": 60}]
        assert await deployment_settings.chosen(session, "ft:1") == {}

    within(settings, story)


def test_a_choice_pins_or_unpins_beside_the_settings_file(settings: Settings) -> None:
    async def story(session: AsyncSession) -> None:
        assert await deployment_settings.pinned(session, settings) == {"tiny"}
        await deployment_settings.choose(session, "tiny", {"pinned": False})
        await deployment_settings.choose(session, "ft:1", {"pinned": True})
        assert await deployment_settings.pinned(session, settings) == {"ft:1"}

    within(settings, story)


def test_gpus_are_used_as_soon_as_one_model_is_placed_on_them(settings: Settings) -> None:
    async def story(session: AsyncSession) -> None:
        assert not await deployment_settings.use_gpus(session, settings)
        await deployment_settings.choose(session, "ft:1", {"num_gpus": 0.5})
        assert await deployment_settings.use_gpus(session, settings)

    within(settings, story)


def test_a_stored_value_that_this_release_refuses_has_no_effect_and_is_logged_once(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(session: AsyncSession) -> None:
        await deployment_settings.choose(session, "ft:1", {"max_model_len": -7, "of_later": 1, "idle_seconds": 9.0})
        for _ in range(3):
            found = await deployment_settings.of(session, settings, ["ft:1"])
            assert found["ft:1"].model_dump(exclude_unset=True) == {"idle_seconds": 9.0}
        (record,) = caplog.records
        assert "-7" in record.getMessage()

    within(settings, story)

"""Tests which vLLM engine answers for a model."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from dpo_core.config import Lora, Quantization
from services.contract import Adapter
from services.control_plane.core.store import Store, migrate
from services.control_plane.models.deployments.deployments import Reference, references
from services.control_plane.models.deployments.engines import Engine, engine_of
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings
from services.deployment_settings import DeploymentSettings

AT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def settings(offline: Settings) -> Settings:
    """Returns the settings of a service with a policy ft:3, which has all weights, and an adapter ft:1."""
    migrate(offline.database_url)
    columns = "id, project_id, spec, model_source, model_root, priority, desired, observed, version"
    values = "'ftjob-3', 'proj_default', '{}', '/m', 'tiny', 0, 'run', 'queued', 1"
    with psycopg.connect(offline.database_url, autocommit=True) as rows:
        rows.execute(f"INSERT INTO jobs ({columns}) VALUES ({values})")
        for number in (1, 3):
            rows.execute(
                "INSERT INTO models (id, project_id, source, root, job_id) VALUES (%s, 'proj_default', %s, 'tiny', %s)",
                [f"ft:{number}", f"s3://b/{number}", "ftjob-3"],
            )
    return offline


def engine(settings: Settings, model: NamedModel) -> Engine:
    async def find() -> Engine:
        store = Store(settings.database_url)
        try:
            async with store.begin() as session:
                return await engine_of(session, settings, model)
        finally:
            await store.close()

    return asyncio.run(find())


def adapter_on(source: str, **options: object) -> NamedModel:
    return NamedModel(
        "ft:1",
        "s3://b/1",
        "tiny",
        AT,
        "ftjob-1",
        base_source=source,
        adapter=Lora(r=8),
        **options,  # type: ignore[arg-type]
    )


def test_a_base_model_and_a_policy_with_all_weights_have_their_own(settings: Settings) -> None:
    for model in (NamedModel("tiny", "/m", "tiny", AT), NamedModel("ft:2", "s3://b/2", "tiny", AT, "ftjob-2")):
        assert engine(settings, model) == Engine(model.id, model)
        assert engine(settings, model).headers == {}


def test_an_adapter_has_that_of_its_base_model(settings: Settings) -> None:
    found = engine(settings, adapter_on(settings.models["tiny"].source))
    assert (found.loaded.id, found.loaded.source) == ("tiny", settings.models["tiny"].source)
    assert found.adapter == Adapter(id="ft:1", source="s3://b/1")


def test_an_adapter_on_a_policy_has_that_of_the_policy(settings: Settings) -> None:
    found = engine(settings, adapter_on("s3://b/3"))
    policy = NamedModel("ft:3", "s3://b/3", "tiny", AT, "ftjob-3")
    assert found.app_name == engine(settings, policy).app_name
    assert found.adapter is not None


def test_an_adapter_on_weights_that_the_settings_name_no_more_does_not_get_others(settings: Settings) -> None:
    found = engine(settings, adapter_on("/moved"))
    assert (found.loaded.id, found.loaded.source) == ("tiny", "/moved")
    assert found.app_name != engine(settings, NamedModel("tiny", settings.models["tiny"].source, "tiny", AT)).app_name


@pytest.mark.parametrize(
    ("adapter", "quantization", "own", "why"),
    [
        (Lora(r=32), None, {}, None),
        (Lora(r=32, use_rslora=True, target_modules=("q_proj",)), None, {}, None),
        (Lora(r=33), None, {}, "its rank is 33, but its base model takes at most 32 (max_lora_rank)"),
        (Lora(use_dora=True), None, {}, "it uses DoRA"),
        (Lora(), "nf4", {}, "its base model is in NF4"),
        (Lora(r=1), None, {"max_lora_rank": 0}, "its base model takes no adapters (max_lora_rank 0)"),
        (Lora(r=1), None, {"mode": "merged"}, "the mode of its deployment is 'merged'"),
    ],
)
def test_what_cannot_be_attached_is_merged(
    settings: Settings, adapter: Lora, quantization: Quantization | None, own: dict[str, Any], why: str | None
) -> None:
    tiny = settings.models["tiny"].model_copy(update={"deployment": DeploymentSettings(**own)})
    settings = settings.model_copy(update={"models": {"tiny": tiny}})
    model = NamedModel(
        "ft:1", "s3://b/1", "tiny", AT, base_source=tiny.source, adapter=adapter, quantization=quantization
    )
    found = engine(settings, model)
    assert found.why_merged == why
    assert (found.loaded == model) == (found.adapter is None) == (why is not None)


def test_an_adapter_on_experts_is_merged(settings: Settings) -> None:
    model = adapter_on(settings.models["tiny"].source, on_experts=True)
    assert engine(settings, model) == Engine("ft:1", model, why_merged="it is on the experts of a mixture of experts")


def test_the_reference_of_a_job_that_goes_on_from_an_adapter_is_scored_with_it_by_the_engine_of_the_base(
    settings: Settings,
) -> None:
    """A job stores only the id and the source of its reference."""
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute(
            "UPDATE models SET base_source = %s, adapter = '{\"r\": 8}' WHERE id = 'ft:1'",
            [settings.models["tiny"].source],
        )

    async def find() -> dict[str, Reference]:
        store = Store(settings.database_url)
        try:
            async with store.begin() as session:
                adapter, base = NamedModel("ft:1", "s3://b/1", "tiny", AT), NamedModel("tiny", "/m", "tiny", AT)
                return await references(session, settings, {"one": adapter, "other": base})
        finally:
            await store.close()

    found = asyncio.run(find())
    base = NamedModel("tiny", settings.models["tiny"].source, "tiny", AT)
    assert (found["one"].app_name, found["one"].adapter) == (base.app_name, Adapter(id="ft:1", source="s3://b/1"))
    assert found["one"].loaded.id == "tiny"
    assert found["other"].adapter is None

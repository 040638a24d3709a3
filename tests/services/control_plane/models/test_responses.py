"""Tests the JSON of models and of permissions to use them."""

from datetime import UTC, datetime

from dpo_core.config import Lora
from services.control_plane.core.tables import CheckpointPermission
from services.control_plane.models.models import NamedModel
from services.control_plane.models.responses import model_object, permission_object
from services.control_plane.settings import Settings

AT = datetime(2026, 1, 2, tzinfo=UTC)
SECONDS = 1_767_312_000
BASE = NamedModel("tiny", "/models/tiny", "tiny", AT)
ADAPTER = NamedModel("ft:1", "s3://b/1", "tiny", AT, "ftjob-1", "/models/tiny", Lora(r=4), "nf4")
REWARD = NamedModel("ft:2", "s3://b/2", "tiny", AT, "ftjob-2", num_outputs=1)


def test_a_base_model_belongs_to_the_organization_and_its_source_is_not_told(offline: Settings) -> None:
    told = model_object(BASE, offline)
    assert told["x_raydpo"] == {"root": "tiny", "job": None, "kind": "policy", "adapter": "none", "quantization": None}
    assert (told["id"], told["created"], told["owned_by"]) == ("tiny", SECONDS, offline.organization)
    assert "/models" not in str(told)


def test_an_adapter_tells_its_options_and_a_reward_model_what_it_is(offline: Settings) -> None:
    told = model_object(ADAPTER, offline)["x_raydpo"]
    assert (told["job"], told["quantization"], told["adapter"]["type"], told["adapter"]["r"]) == (
        "ftjob-1",
        "nf4",
        "lora",
        4,
    )
    assert model_object(REWARD, offline)["x_raydpo"]["kind"] == "reward"


def test_a_permission_names_the_project_that_has_it() -> None:
    row = CheckpointPermission(id="cp_1", created_at=AT, project_id="proj_1", model_id="ft:1")
    expected = {"id": "cp_1", "object": "checkpoint.permission", "created_at": SECONDS, "project_id": "proj_1"}
    assert permission_object(row) == expected

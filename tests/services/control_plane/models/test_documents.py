"""Tests that the JSON of models and permissions is what the OpenAPI document describes."""

import pytest

from services.control_plane.core.tables import CheckpointPermission
from services.control_plane.models.documents import ModelDocument, PermissionDocument
from services.control_plane.models.models import NamedModel
from services.control_plane.models.responses import model_object, permission_object
from services.control_plane.settings import Settings
from tests.services.control_plane.documented import check
from tests.services.control_plane.models.test_responses import ADAPTER, AT, BASE, REWARD


@pytest.mark.parametrize("model", [BASE, ADAPTER, REWARD], ids=["base", "adapter", "reward"])
def test_a_model_has_the_fields_that_are_described_and_no_others(model: NamedModel, offline: Settings) -> None:
    check(ModelDocument, model_object(model, offline))


def test_a_permission_is_as_described() -> None:
    row = CheckpointPermission(id="cp_1", created_at=AT, project_id="proj_1", model_id="ft:1")
    check(PermissionDocument, permission_object(row))

"""Tests that the JSON of models is what the OpenAPI document describes."""

import pytest
from pydantic import TypeAdapter

from services.control_plane.models.documents import ModelDocument
from services.control_plane.models.models import NamedModel
from services.control_plane.models.responses import model_object
from services.control_plane.settings import Settings
from tests.services.control_plane.models.test_responses import ADAPTER, BASE, REWARD


@pytest.mark.parametrize("model", [BASE, ADAPTER, REWARD], ids=["base", "adapter", "reward"])
def test_a_model_has_the_fields_that_are_described_and_no_others(model: NamedModel, offline: Settings) -> None:
    told = model_object(model, offline)
    assert TypeAdapter(ModelDocument).validate_python(told, strict=True, extra="forbid") == told

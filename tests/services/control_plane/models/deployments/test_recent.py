"""Tests that what the database says about models is remembered only for a moment, and forgotten at a change."""

import time
from datetime import UTC, datetime

import pytest

from services.control_plane.models.deployments import recent
from services.control_plane.models.deployments.engines import Engine
from services.control_plane.models.deployments.recent import Found, RecentModels
from services.control_plane.models.models import NamedModel

MODEL = NamedModel("tiny", "/nowhere/tiny", "tiny", datetime.now(UTC))


def test_a_model_is_remembered_for_its_project_alone_until_something_changes() -> None:
    models, found = RecentModels(), Found(MODEL, Engine("tiny", MODEL), 0)
    models.keep("proj_a", "tiny", found)
    assert (models.get("proj_a", "tiny"), models.get("proj_b", "tiny")) == (found, None)
    models.forget()
    assert models.get("proj_a", "tiny") is None


def test_a_model_is_forgotten_after_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "SECONDS", 0.05)
    models = RecentModels()
    models.keep("proj_a", "tiny", Found(MODEL, Engine("tiny", MODEL), 0))
    time.sleep(0.1)
    assert models.get("proj_a", "tiny") is None

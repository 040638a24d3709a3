"""Tests which checks of files are the same, and what each asks for."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dpo_core.config import TrainConfig
from services.contract import CheckRequest
from services.control_plane.core.tables import File
from services.control_plane.files.model_check import check_of
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings
from services.control_plane.side_jobs import SideJob

FILE = {"project_id": "proj_1", "sha256": "ab", "uri": "file:///files/1", "reading": {"columns": {"q": "prompt"}}}
MODEL = NamedModel("tiny", "/models/tiny", "tiny", datetime(2026, 1, 2, tzinfo=UTC))
CONFIG = TrainConfig(max_length=64, truncation="keep_end")


def check(home: Path, model: NamedModel = MODEL, config: TrainConfig = CONFIG, by: str = "a", **more: Any) -> SideJob:
    given: Any = {"api_key": "k", "advertised_url": "http://here", "ray_url": "http://ray"}
    settings = Settings(home=home, storage_url="file:///storage", DATABASE_URL="postgresql://", **given)
    return check_of(File(**FILE | more), model, config, settings, by)


def test_a_check_asks_for_the_rows_as_they_are_to_be_read(tmp_path: Path) -> None:
    found = check(tmp_path)
    assert found.uri == f"file:///storage/checks/{found.key}"
    request = found.request_in(found.folder(2))
    assert isinstance(request, CheckRequest)
    assert request.folder_uri == f"{found.uri}/2"
    recipe = request.recipe
    assert (recipe.training_uri, recipe.model_source, recipe.columns) == (
        "file:///files/1",
        "/models/tiny",
        {"q": "prompt"},
    )
    assert (recipe.max_length, recipe.truncation) == (64, "keep_end")


def test_the_same_bytes_model_and_options_are_one_check(tmp_path: Path) -> None:
    same = check(tmp_path, uri="file:///files/2", config=replace(CONFIG, n_epochs=3))
    assert same.id == check(tmp_path).id


@pytest.mark.parametrize(
    "other",
    [
        {"project_id": "proj_2"},
        {"sha256": "cd"},
        {"reading": None},
        {"model": replace(MODEL, source="/models/other")},
        {"config": replace(CONFIG, max_length=65)},
        {"by": "another service"},
    ],
)
def test_what_would_give_another_result_or_belongs_to_others_is_another_check(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    assert check(tmp_path, **other).id != check(tmp_path).id

"""Tests the route /v1/x/datasets/check."""

import json
from typing import Any

import httpx
import pytest

from tests.services.control_plane import test_side_jobs as side_jobs
from tests.services.control_plane.conftest import FakeRay

settings, ray = side_jobs.settings, side_jobs.ray  # fixtures
file_id, ask = side_jobs.file_id, side_jobs.ask


def test_without_a_model_the_survey_is_answered_at_once(ray: FakeRay, ask: Any) -> None:
    answer = ask().json()
    assert (answer["object"], answer["status"], answer["error"]) == ("dataset.check", "completed", None)
    assert answer["report"]["survey"]["num_rows"] == 13
    assert list(answer["report"]) == ["survey"]
    assert not ray.submissions


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"modell": "tiny"}, 400, "modell", "unknown_parameter"),
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"training_file": "file-none"}, 404, "training_file", "file_not_found"),
        ({"max_length": 8}, 400, "max_length", "invalid_value"),
        ({"model": "tiny", "max_length": 1}, 400, "max_length", "invalid_value"),
        ({"model": "tiny", "truncation": "both"}, 400, "truncation", "invalid_value"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    ray: FakeRay, ask: Any, body: dict[str, Any], status: int, param: str, code: str
) -> None:
    answer = ask(**body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert not ray.submissions


def test_the_key_is_needed(base_url: str) -> None:
    answer = httpx.post(f"{base_url}/v1/x/datasets/check", content=json.dumps({"training_file": "file-none"}))
    assert answer.status_code == 401

"""Tests the bodies of requests for projects and API keys."""

import time
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from services.control_plane.tenants.requests import CreateKey, CreateProject, UpdateProject


def test_a_key_may_do_all_but_administer_unless_the_body_says_so() -> None:
    body = CreateKey.model_validate({"name": "ci"})
    assert body.scopes == ["read", "write", "inference"]
    assert (body.project_id, body.requests_per_minute, body.tokens_per_minute, body.expires_at) == (None,) * 4


def test_a_key_ends_in_the_future() -> None:
    soon = int(time.time()) + 60
    assert CreateKey(name="ci", expires_at=soon).expires_at == soon
    with pytest.raises(ValidationError, match="is in the past; send a time in the future"):
        CreateKey(name="ci", expires_at=soon - 120)


def test_an_update_has_only_the_fields_that_were_sent_and_null_ends_a_limit() -> None:
    body = UpdateProject.model_validate({"max_bytes": None, "weight": 2})
    assert body.model_dump(exclude_unset=True) == {"max_bytes": None, "weight": 2.0}


@pytest.mark.parametrize(
    ("kind", "body", "where"),
    [
        (CreateProject, {}, "name"),
        (CreateProject, {"name": "a\nb"}, "name"),
        (CreateProject, {"name": "n" * 65}, "name"),
        (UpdateProject, {"weight": 0.001}, "weight"),
        (UpdateProject, {"max_running_jobs": 2**31}, "max_running_jobs"),
        (UpdateProject, {"max_accelerator_hours": float("inf")}, "max_accelerator_hours"),
        (UpdateProject, {"max_jobs": 1}, "max_jobs"),
        (CreateKey, {"name": "k", "scopes": []}, "scopes"),
        (CreateKey, {"name": "k", "tokens_per_minute": 0}, "tokens_per_minute"),
    ],
)
def test_a_wrong_field_is_named(kind: type[BaseModel], body: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert [error["loc"] for error in refused.value.errors()] == [(where,)]

"""Tests which scope of an API key each route needs, and how a key without it is refused."""

import pytest

from services.control_plane.auth.keys import Caller
from services.control_plane.auth.scopes import check, needed
from services.control_plane.core.errors import Forbidden


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/v1/files/{file_id}", "read"),
        ("HEAD", "/v1/models", "read"),
        ("POST", "/v1/files", "write"),
        ("DELETE", "/v1/models/{model}", "write"),
        ("POST", "/v1/chat/completions", "inference"),
        ("GET", "/v1/x/keys", "admin"),
        ("POST", "/v1/x/projects/{project_id}", "admin"),
        ("GET", "/v1/x/keysmith", "read"),
    ],
)
def test_a_route_needs_one_scope(method: str, path: str, scope: str) -> None:
    assert needed(method, path) == scope


def test_a_key_without_the_scope_is_told_which_it_has() -> None:
    caller = Caller("key_1", "proj_default", frozenset({"read", "inference"}))
    check(caller, "GET", "/v1/files")
    with pytest.raises(Forbidden, match="'write', but your key has the scopes inference, read; ask an admin"):
        check(caller, "POST", "/v1/files")

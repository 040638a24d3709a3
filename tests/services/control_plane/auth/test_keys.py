"""Tests which API keys are created, and which are valid."""

import asyncio

import httpx
import psycopg
import pytest

from services.control_plane.auth import keys
from services.control_plane.auth.keys import CONFIGURED, SCOPES, Caller
from services.control_plane.core.errors import InvalidRequest, NotFound
from services.control_plane.core.store import Store, migrate
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import api_of, new_key, new_project


def test_a_projects_admin_makes_no_key_beyond_what_is_usual(
    api: httpx.Client, base_url: str, settings: Settings
) -> None:
    project = new_project(api, "many-keys")

    async def check(caller: Caller, asked: int | None, name: str = "requests_per_minute") -> None:
        store = Store(settings.database_url)
        try:
            async with store.begin() as session:
                wanted = {"requests_per_minute": None, "tokens_per_minute": None} | {name: asked}
                await keys.check(session, caller, wanted, {"requests_per_minute": 60, "tokens_per_minute": 60})
        finally:
            await store.close()

    own = Caller("key_1", project, frozenset(SCOPES))
    asyncio.run(check(own, 60))
    asyncio.run(check(own, None))
    asyncio.run(check(CONFIGURED, 1_000_000))
    with pytest.raises(InvalidRequest, match="requests_per_minute is 61, but a key may have at most 60"):
        asyncio.run(check(own, 61))
    with pytest.raises(InvalidRequest, match="tokens_per_minute is 61, but a key may have at most 60"):
        asyncio.run(check(own, 61, "tokens_per_minute"))
    with psycopg.connect(settings.database_url) as connection:
        columns = "id, project_id, name, sha256, hint, scopes"
        connection.execute(
            f"INSERT INTO keys ({columns}) SELECT 'key_' || n, %s, 'k', 'sha' || n, '', '{{}}' FROM"
            " generate_series(1, 99) n",
            [project],
        )
    with api_of(base_url, new_key(api, project_id=project, scopes=["admin"])["value"]) as admin:
        refused = admin.post("/x/keys", json={"name": "one more"})
        assert refused.status_code == 400
        assert "The project has 100 keys, and the limit is 100; revoke a key first." in refused.text
    assert new_key(api, project_id=project)


def test_a_key_is_found_by_the_digest_of_its_text_until_it_is_revoked(database_url: str) -> None:
    migrate(database_url)
    none = {"requests_per_minute": None, "tokens_per_minute": 9}

    async def story() -> None:
        store = Store(database_url)
        try:
            async with store.begin() as session:
                row, text = await keys.create(
                    session, "proj_default", name="k", scopes=["inference", "read", "read"], **none, expires_at=None
                )
                assert (row.scopes, row.hint, text in row.sha256) == (["read", "inference"], text[-4:], False)
                digest = keys.digest(text)
                own = Caller(row.id, "proj_default", frozenset({"read", "inference"}), None, 9)
                assert await keys.callers_of(session, [digest, "unknown"]) == {digest: own}
                first = (await keys.revoke(session, CONFIGURED, row.id)).revoked_at
                assert (await keys.revoke(session, CONFIGURED, row.id)).revoked_at == first
                assert await keys.callers_of(session, [digest]) == {}
                with pytest.raises(NotFound, match=row.id):
                    await keys.find(session, Caller("key_x", "proj_other", frozenset(SCOPES)), row.id)
        finally:
            await store.close()

    asyncio.run(story())


def test_words_that_are_no_scopes_are_ignored() -> None:
    assert keys.known(["admin", "root", 5, "read"]) == {"admin", "read"}

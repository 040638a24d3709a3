"""Tests the routes that say whether the process lives and whether it is ready."""

import asyncio

import httpx
import pytest

from services.control_plane.core.errors import Unavailable
from services.control_plane.core.store import Store
from services.control_plane.http import health
from tests.services.control_plane.conftest import free_port


def test_a_service_whose_database_takes_writes_is_ready_and_asks_for_no_key(base_url: str) -> None:
    for path, status in (("/healthz", "ok"), ("/readyz", "ready")):
        answer = httpx.get(base_url + path, trust_env=False)
        assert (answer.status_code, answer.json()) == (200, {"status": status})


def test_without_a_database_the_process_lives_and_is_not_ready() -> None:
    async def ask() -> None:
        store = Store(f"postgresql://nobody@127.0.0.1:{free_port()}/none")
        try:
            with pytest.raises(Unavailable, match="database does not answer") as refused:
                await health.readyz(store)
        finally:
            await store.close()
        assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "5")
        assert await health.healthz() == {"status": "ok"}

    asyncio.run(ask())

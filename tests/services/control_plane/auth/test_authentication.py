"""Tests who is found behind a bearer token, for how long the answer is kept, and what is recorded of its use."""

import asyncio
import time
from typing import Any

import httpx
import pytest

from services.control_plane.auth.authentication import KNOWN_SECONDS, Authentication
from services.control_plane.core.errors import Unauthorized
from services.control_plane.core.store import Store
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import api_of, new_key

BUSY_SECONDS = 60.0


def within(seconds: float, wanted: int, ask: Any) -> httpx.Response:
    """Repeats the request until its answer has the status `wanted`, and returns this answer.

    On a busy machine, this may take longer than `seconds`.
    """
    deadline = time.monotonic() + seconds + BUSY_SECONDS
    while (answer := ask()).status_code != wanted:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)
    return answer


def test_a_revoked_key_stops_within_its_second_also_where_it_is_known(api: httpx.Client, base_url: str) -> None:
    made = new_key(api)
    with api_of(base_url, made["value"]) as own:
        assert own.get("/files").status_code == 200
        revoked = api.post(f"/x/keys/{made['id']}/revoke").json()
        assert revoked["revoked_at"] is not None
        answer = within(KNOWN_SECONDS + 0.5, 401, lambda: own.get("/files"))
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert made["value"] not in answer.text
    assert api.post(f"/x/keys/{made['id']}/revoke").json() == revoked


@pytest.mark.slow
def test_an_expired_key_stops(api: httpx.Client, base_url: str) -> None:
    made = new_key(api, expires_at=int(time.time()) + 2)
    with api_of(base_url, made["value"]) as own:
        assert own.get("/files").status_code == 200
        within(3 + KNOWN_SECONDS, 401, lambda: own.get("/files"))


def test_the_last_use_is_noted_apart_from_the_requests(api: httpx.Client, settings: Settings) -> None:
    made = new_key(api)

    def last_used_at() -> int | None:
        return api.get(f"/x/keys/{made['id']}").json()["last_used_at"]  # type: ignore[no-any-return]

    async def use() -> None:
        store = Store(settings.database_url)
        authentication = Authentication(store, settings)
        for _ in range(3):
            assert (await authentication.caller(made["value"])).key_id == made["id"]
        assert last_used_at() is None
        await authentication.note_uses()
        await store.close()

    asyncio.run(use())
    assert (last_used_at() or 0) >= made["created_at"]


@pytest.mark.usefixtures("base_url")
def test_unknown_keys_that_come_together_share_a_look_up_and_none_is_looked_up_twice(settings: Settings) -> None:
    class Counted(Store):
        transactions = 0

        def begin(self) -> Any:
            self.transactions += 1
            return super().begin()

    async def work() -> None:
        store = Counted(settings.database_url)
        authentication = Authentication(store, settings)
        for _ in range(2):
            asked = (authentication.caller(f"rd-nobodys-{number}") for number in range(200))
            refused = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(error) for error in refused} == {Unauthorized}
        assert 1 <= store.transactions <= 2  # the first one's, and that of all who came meanwhile
        await store.close()

    asyncio.run(work())

"""Finds the caller (the sender) of a request from the bearer token in the request.

A token is the API key from the settings, an API key in the database, or a token of the OpenID Connect issuer.
"""

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING

from cachetools import TTLCache
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from services.control_plane.auth import keys
from services.control_plane.auth.keys import CONFIGURED, Caller, digest
from services.control_plane.core.batching import Batcher
from services.control_plane.core.errors import ApiError, Unauthorized
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Project
from services.control_plane.settings import Settings

if TYPE_CHECKING:
    from services.control_plane.auth.code_flow import CodeFlow
    from services.control_plane.auth.oidc import Issuer

log = logging.getLogger(__name__)

KNOWN_SECONDS = 1.0  # callers are cached for this long, so a revoked or expired key keeps working until then
MAX_KNOWN = 10_000
NOTE_SECONDS = 60.0  # how often the last uses of keys are written to the database


class Authentication:
    """Finds the caller (the sender of a request) to whom a bearer token belongs. Caches each caller for a second to
    save queries.

    Unknown tokens are cached as well. Tokens that arrive at the same time share a query.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._issuer = _issuer(settings) if settings.oidc_issuer else None
        self.code_flow = _code_flow(self._issuer, settings) if self._issuer and settings.oidc_client_id else None
        self._known: TTLCache[str, Caller] = TTLCache(MAX_KNOWN, KNOWN_SECONDS)
        self._unknown: TTLCache[str, bool] = TTLCache(MAX_KNOWN, KNOWN_SECONDS)
        self._keys = Batcher(self._look_up)
        self._used: set[str] = set()

    async def caller(self, token: str) -> Caller:
        """Returns the caller, the sender of the request with this bearer token. Raises Unauthorized if the token is not
        valid."""
        if secrets.compare_digest(token.encode(), self._settings.api_key.get_secret_value().encode()):
            return CONFIGURED
        name = digest(token)
        caller = self._known.get(name)
        if caller is None:
            caller = self._known[name] = await self._find(token, name)
        self._used.add(caller.key_id)
        return caller

    async def check_database(self) -> None:
        """Tests whether the database answers. The method `caller` reads from the database when it gets a token that it
        does not know yet.

        Raises SQLAlchemyError or OSError if the database does not answer.
        """
        async with self._store.begin() as session:
            await session.execute(select(1))

    async def _find(self, token: str, name: str) -> Caller:
        if self._issuer is not None and self._issuer.is_token(token):
            return await self._with_project(await self._issuer.caller(token))
        caller = None if name in self._unknown else await self._keys.get(name)
        if caller is None:
            self._unknown[name] = True
            shown = f"{token[:3]}…{token[-4:]}" if len(token) >= 16 else "the key that was sent"
            remedy = "Ask the service's operator for a key; `raydpo up` keeps its key in ~/.raydpo/api.key."
            raise Unauthorized(f"Incorrect API key provided: {shown}. {remedy}", code="invalid_api_key")
        return caller

    async def _look_up(self, digests: list[str]) -> dict[str, Caller]:
        async with self._store.begin() as session:
            return await keys.callers_of(session, digests)

    async def project_of(self, token: str) -> str | None:
        """Returns the id of the project to which the token gives access. Returns None if the token is not valid, or
        cannot be checked now, for example because the database does not answer.
        """
        try:
            return (await self.caller(token)).project_id
        except (ApiError, SQLAlchemyError, OSError):
            return None

    async def _with_project(self, caller: Caller) -> Caller:
        """Returns the caller. Raises Unauthorized if the caller's project does not exist or is archived."""
        async with self._store.begin() as session:
            living = select(Project.id).where(Project.id == caller.project_id, Project.archived_at.is_(None))
            if await session.scalar(living) is None:
                message = (
                    f"The token's claim '{caller.project_claim}' leads to the project '{caller.project_id}', which "
                    "does not exist or is archived; ask the service's operator."
                )
                raise Unauthorized(message, code="invalid_api_key")
        return caller

    # --- last use -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Stores in the database, every minute, when API keys were last used. Runs until cancelled; then stores the
        last uses that are not stored yet.
        """
        try:
            while True:
                await asyncio.sleep(NOTE_SECONDS)
                await self.note_uses()
        finally:
            await self.note_uses()
            if self._issuer is not None:
                await self._issuer.close()

    async def note_uses(self) -> None:
        """Stores the current time as the last use of each API key that was used since the previous call."""
        used, self._used = self._used, set()
        if not used:
            return
        try:
            async with self._store.begin() as session:
                await keys.note_uses(session, list(used))
        except (SQLAlchemyError, OSError) as error:
            log.warning("The time of last use of %d API keys could not be stored: %s", len(used), error)


def _issuer(settings: Settings) -> "Issuer":
    from services.control_plane.auth.oidc import Issuer  # the import of its cryptography takes a tenth of a start

    return Issuer(settings)


def _code_flow(issuer: "Issuer", settings: Settings) -> "CodeFlow":
    from services.control_plane.auth.code_flow import CodeFlow

    return CodeFlow(issuer, settings)

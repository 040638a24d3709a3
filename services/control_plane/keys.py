"""API keys: whose request it is, and what it may do."""

import hashlib
import secrets
from dataclasses import dataclass

from sqlalchemy import func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.errors import Unauthorized
from services.control_plane.settings import Settings
from services.control_plane.tables import DEFAULT_PROJECT, Key

SCOPES = ("read", "write", "inference", "admin")


@dataclass(frozen=True)
class Caller:
    """Who asks: a key, its project, and its scopes."""

    key_id: str
    project_id: str
    scopes: frozenset[str]


async def authenticate(session: AsyncSession, given: str, settings: Settings) -> Caller:
    """The caller of a bearer token: the configured key, of the default project, or a live one of the table."""
    if secrets.compare_digest(given.encode(), settings.api_key.get_secret_value().encode()):
        return Caller("key_configured", DEFAULT_PROJECT, frozenset(SCOPES))
    alive = or_(Key.expires_at.is_(None), Key.expires_at > func.now())
    query = select(Key).where(Key.sha256 == digest(given), Key.revoked_at.is_(None), alive)
    if (key := await session.scalar(query)) is None:
        shown = f"{given[:3]}…{given[-4:]}" if len(given) >= 16 else "the one sent"
        message = f"Incorrect API key provided: {shown}. The service printed where its key lies when it started."
        raise Unauthorized(message, code="invalid_api_key")
    return Caller(key.id, key.project_id, frozenset(key.scopes))


def digest(text: str) -> str:
    """A key has 256 bits of chance, so that a plain digest of it tells nothing."""
    return hashlib.sha256(text.encode()).hexdigest()

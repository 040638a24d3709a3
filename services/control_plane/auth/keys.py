"""Creates, finds and revokes API keys. Each key belongs to a project, and has scopes, the permissions of requests with
this key.

The database stores only the SHA-256 of keys.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import get_args

from sqlalchemy import Select, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import InvalidRequest, NotFound
from services.control_plane.core.tables import DEFAULT_PROJECT, Key, Project
from services.control_plane.settings import Scope

MAX_KEYS = 100  # the most valid keys that a project's own admin may create; each key has its own requests per minute
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class Caller:
    """The sender of a request: the id, the project and the scopes (permissions) of the API key, or OpenID Connect
    token, in the request.

    If `requests_per_minute` or `tokens_per_minute` is None, the setting of the same name limits the caller.
    `project_claim` and `scopes_claim` are the names of the token's claims that decided the project and the scopes; None
    for an API key.
    """

    key_id: str
    project_id: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    project_claim: str | None = None
    scopes_claim: str | None = None

    @property
    def manages_all(self) -> bool:
        """Whether the caller's project is the default project, whose admins manage all projects."""
        return self.project_id == DEFAULT_PROJECT


CONFIGURED = Caller("key_configured", DEFAULT_PROJECT, frozenset(SCOPES))  # the caller with the key from the settings


async def create(
    session: AsyncSession,
    project_id: str,
    *,
    name: str,
    scopes: Sequence[Scope],
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    expires_at: datetime | None,
) -> tuple[Key, str]:
    """Creates an API key, and returns its database row and the text of the key. The text is not stored and cannot be
    shown again.

    `scopes` are the key's permissions. If `requests_per_minute` or `tokens_per_minute` is None, the setting of the same
    name limits the key. If `expires_at` is None, the key never expires.
    """
    text = f"rd-{secrets.token_urlsafe(32)}"
    key = Key(
        id=f"key_{secrets.token_hex(12)}",
        project_id=project_id,
        name=name,
        sha256=digest(text),
        hint=text[-4:],
        scopes=sorted(set(scopes), key=SCOPES.index),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        expires_at=expires_at,
    )
    session.add(key)
    await session.flush()
    await session.refresh(key)
    return key, text


Limits = Mapping[str, int | None]  # per minute: of requests_per_minute and tokens_per_minute


async def check(session: AsyncSession, caller: Caller, wanted: Limits, usual: Limits) -> None:
    """Raises InvalidRequest if the caller may not create an API key with the limits `wanted`.

    A project's own admin may give a key at most the limits `usual`, which come from the settings. Also raises
    InvalidRequest if the project has the largest allowed number of keys. Admins of the default project may create any
    key.
    """
    if caller.manages_all:
        return
    for name, most in usual.items():
        if most is not None and (value := wanted[name]) is not None and value > most:
            message = f"{name} is {value}, but a key may have at most {most}."
            remedy = (
                f"Send a lower limit, or ask an admin of the project {DEFAULT_PROJECT} for a key with a higher one."
            )
            raise InvalidRequest(f"{message} {remedy}", param=name)
    living = select(func.count()).select_from(Key).where(Key.project_id == caller.project_id, Key.revoked_at.is_(None))
    unexpired = or_(Key.expires_at.is_(None), Key.expires_at > func.now())
    if (count := await session.scalar(living.where(unexpired)) or 0) >= MAX_KEYS:
        raise InvalidRequest(f"The project has {count} keys, and the limit is {MAX_KEYS}; revoke a key first.")


def managed_by(caller: Caller) -> Select[Key]:
    """Returns the SQL query for the API keys that the caller may manage.

    An admin of the default project may manage all keys, any other caller those of its own project.
    """
    every = select(Key)
    return every if caller.manages_all else every.where(Key.project_id == caller.project_id)


async def find(session: AsyncSession, caller: Caller, key_id: str) -> Key:
    key = await session.scalar(managed_by(caller).where(Key.id == key_id))
    if key is None:
        raise NotFound(
            f"There is no API key with the id '{key_id}'; list the keys for their ids.",
            param="key_id",
            code="key_not_found",
        )
    return key


async def revoke(session: AsyncSession, caller: Caller, key_id: str) -> Key:
    """Revokes the API key, so that it no longer works, and returns its row. Revoking a key twice is harmless.

    Raises NotFound if the caller may not manage a key with this id.
    """
    key = await find(session, caller, key_id)
    key.revoked_at = key.revoked_at or datetime.now(UTC)
    return key


async def callers_of(session: AsyncSession, digests: Sequence[str]) -> dict[str, Caller]:
    """Returns the callers (senders of requests) whose API keys have these digests, by digest.

    A digest is the SHA-256 of a key's text. Leaves out keys that have expired or were revoked, and keys of archived
    projects.
    """
    unexpired = or_(Key.expires_at.is_(None), Key.expires_at > func.now())
    query = select(Key).join(Project, Project.id == Key.project_id).where(Key.sha256.in_(digests), unexpired)
    living = await session.scalars(query.where(Key.revoked_at.is_(None), Project.archived_at.is_(None)))
    return {
        key.sha256: Caller(key.id, key.project_id, known(key.scopes), key.requests_per_minute, key.tokens_per_minute)
        for key in living
    }


def known(words: Sequence[object]) -> frozenset[Scope]:
    """Returns those of the given words that are names of scopes (permissions of API keys), and ignores all others."""
    return frozenset(scope for scope in SCOPES if scope in words)


async def note_uses(session: AsyncSession, key_ids: Sequence[str]) -> None:
    await session.execute(update(Key).where(Key.id.in_(key_ids)).values(last_used_at=func.now()))


def digest(text: str) -> str:
    """Returns the SHA-256 of an API key's text. A key has 256 random bits, so its digest needs no salt."""
    return hashlib.sha256(text.encode()).hexdigest()

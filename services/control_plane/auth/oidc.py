"""Tokens of an OpenID Connect issuer in place of keys: signed by its published keys, meant for us, and not expired."""

import asyncio
import logging
import math
import time
from typing import Any

import httpx
import jwt

from services.control_plane.auth.keys import Caller, Scope, known
from services.control_plane.core.errors import Unauthorized, Unavailable
from services.control_plane.settings import Settings

log = logging.getLogger(__name__)

ALGORITHMS = ["RS256", "ES256"]  # a token does not choose: no `none`, and no shared secret
REQUIRED = ["exp", "iss", "aud", "sub"]
LEEWAY_SECONDS = 60  # by which the issuer's clock may differ
FRESH_SECONDS = 300  # so long keys are kept before the issuer is asked again
PAUSE_SECONDS = 5  # between two questions, whatever strangers send


class Issuer:
    """The issuer that the settings name. While it does not answer, the keys it published last are good."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._http = httpx.AsyncClient(timeout=5)
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = self._asked_at = -math.inf
        self._asking = asyncio.Lock()

    @staticmethod
    def is_token(text: str) -> bool:
        """Whether it has a JWT's form; the keys that we make have no dots."""
        return text.count(".") == 2

    async def close(self) -> None:
        await self._http.aclose()

    async def caller(self, token: str) -> Caller:
        """Whom the token stands for; that its project exists is not checked. Raises Unauthorized, Unavailable."""
        try:
            claims = await self._claims(token)
        except jwt.PyJWTError as error:
            raise Unauthorized(f"The token is not accepted: {error}.", code="invalid_api_key") from None
        return Caller(f"oidc:{claims['sub']}", self._project(claims), self._scopes(claims))

    async def _claims(self, token: str) -> dict[str, Any]:
        header = jwt.get_unverified_header(token)
        return jwt.decode(
            token,
            await self._key(str(header.get("kid"))),
            algorithms=ALGORITHMS,
            audience=self._settings.oidc_audience,
            issuer=self._settings.oidc_issuer,
            leeway=LEEWAY_SECONDS,
            options={"require": REQUIRED},
        )

    async def _key(self, name: str) -> jwt.PyJWK:
        """The key that a token names. PyJWT's own client would hold all callers while it waits for the issuer."""
        if self._is_due(name) and not (name in self._keys and self._asking.locked()):
            async with self._asking:
                if self._is_due(name):
                    await self._ask()
                    self._asked_at = time.monotonic()
        if key := self._keys.get(name):
            return key
        if not self._keys:
            message = f"The issuer of tokens does not answer. Try again in {PAUSE_SECONDS} seconds, or use an API key."
            raise Unavailable(message, retry_after=PAUSE_SECONDS, code="issuer_unavailable")
        raise jwt.InvalidKeyError("its key is none of the issuer's")

    def _is_due(self, name: str) -> bool:
        now = time.monotonic()
        wanted = name not in self._keys or now - self._fetched_at > FRESH_SECONDS
        return wanted and now - self._asked_at > PAUSE_SECONDS

    async def _ask(self) -> None:
        """Where the issuer publishes its keys, by its discovery document; and the keys."""
        issuer = self._settings.oidc_issuer or ""
        try:
            about = await self._get(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
            if about["issuer"] != issuer:
                raise ValueError(f"it calls itself {about['issuer']}")
            published = jwt.PyJWKSet.from_dict(await self._get(about["jwks_uri"]))
        except (httpx.HTTPError, jwt.PyJWTError, ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("The issuer %s tells no keys: %r", issuer, error)
            return
        usable = [key for key in published.keys if key.public_key_use in ("sig", None)]
        self._keys = {key.key_id: key for key in usable if key.key_id}
        self._fetched_at = time.monotonic()

    async def _get(self, url: str) -> Any:
        return (await self._http.get(url)).raise_for_status().json()

    def _project(self, claims: dict[str, Any]) -> str:
        name = self._settings.oidc_project_claim
        if not isinstance(project_id := claims.get(name), str):
            message = f"The token names no project; its claim '{name}' must be a project's id."
            raise Unauthorized(message, code="invalid_api_key")
        return project_id

    def _scopes(self, claims: dict[str, Any]) -> frozenset[Scope]:
        """Ours among those of the claim, a list or a text with spaces. Others are other services'."""
        given = claims.get(self._settings.oidc_scopes_claim)
        return known(given.split() if isinstance(given, str) else given if isinstance(given, list) else [])

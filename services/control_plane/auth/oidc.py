"""Accepts tokens of an OpenID Connect issuer in place of API keys.

A token must be signed by the issuer, name this service as its audience, and not have expired.
"""

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

ALGORITHMS = ["RS256", "ES256"]  # fixed here, because a token must not choose `none` or a shared secret
REQUIRED = ["exp", "iss", "aud", "sub"]
LEEWAY_SECONDS = 60  # the issuer's clock may differ from ours by this much
FRESH_SECONDS = 300  # how long the issuer's keys are cached
PAUSE_SECONDS = 5  # at least this long between two requests to the issuer, whatever tokens strangers send


class Issuer:
    """The OpenID Connect issuer from the settings, whose tokens the service accepts.

    If the issuer does not answer, the public keys that it last published stay in use.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._http = httpx.AsyncClient(timeout=5)
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = self._asked_at = -math.inf
        self._asking = asyncio.Lock()

    @staticmethod
    def is_token(text: str) -> bool:
        """Whether a text has the form of a JWT, which has two dots. API keys of this service have no dots."""
        return text.count(".") == 2

    async def close(self) -> None:
        await self._http.aclose()

    async def caller(self, token: str) -> Caller:
        """Checks a JWT, and returns the caller that it names. Does not check that the caller's project exists.

        Raises Unauthorized if the token is not valid, and Unavailable if the issuer does not answer.
        """
        try:
            claims = await self._claims(token)
        except jwt.PyJWTError as error:
            raise Unauthorized(
                f"The token in the header `Authorization` is not accepted: {error}. "
                "Send a new token from the issuer, or an API key.",
                code="invalid_api_key",
            ) from None
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
        """Returns the issuer's public key with the id `name`. Fetches the issuer's keys first if they are old or lack
        this id.

        PyJWT's own client would block all requests of this process while it waits for the issuer.
        """
        if self._is_due(name) and not (name in self._keys and self._asking.locked()):
            async with self._asking:
                if self._is_due(name):
                    await self._ask()
                    self._asked_at = time.monotonic()
        if key := self._keys.get(name):
            return key
        if not self._keys:
            message = (
                f"The issuer of the tokens does not answer. Try again in {PAUSE_SECONDS} seconds, or use an API key."
            )
            raise Unavailable(message, retry_after=PAUSE_SECONDS, code="issuer_unavailable")
        raise jwt.InvalidKeyError("it is signed with a key that the issuer has not published")

    def _is_due(self, name: str) -> bool:
        """Whether to fetch the issuer's public keys now, to find the one with the id `name`.

        Returns True if the key is missing or the fetched keys are old, unless the issuer was asked for keys only
        seconds ago.
        """
        now = time.monotonic()
        wanted = name not in self._keys or now - self._fetched_at > FRESH_SECONDS
        return wanted and now - self._asked_at > PAUSE_SECONDS

    async def _ask(self) -> None:
        """Fetches the issuer's discovery document, and then the issuer's keys from the URL in this document."""
        issuer = self._settings.oidc_issuer or ""
        try:
            about = await self._get(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
            if about["issuer"] != issuer:
                raise ValueError(f"the issuer gives its name as {about['issuer']}; correct the setting oidc_issuer")
            published = jwt.PyJWKSet.from_dict(await self._get(about["jwks_uri"]))
        except (httpx.HTTPError, jwt.PyJWTError, ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("The public keys of the OpenID issuer %s could not be fetched: %r", issuer, error)
            return
        usable = [key for key in published.keys if key.public_key_use in ("sig", None)]
        self._keys = {key.key_id: key for key in usable if key.key_id}
        self._fetched_at = time.monotonic()

    async def _get(self, url: str) -> Any:
        return (await self._http.get(url)).raise_for_status().json()

    def _project(self, claims: dict[str, Any]) -> str:
        name = self._settings.oidc_project_claim
        if not isinstance(project_id := claims.get(name), str):
            message = f"The token names no project; its claim '{name}' must be the id of a project."
            raise Unauthorized(message, code="invalid_api_key")
        return project_id

    def _scopes(self, claims: dict[str, Any]) -> frozenset[Scope]:
        """Returns the scopes (permissions) that a token gives: the words of its scopes claim that are scopes of this
        service.

        The claim is a list of words, or a text with spaces between the words.
        """
        given = claims.get(self._settings.oidc_scopes_claim)
        return known(given.split() if isinstance(given, str) else given if isinstance(given, list) else [])

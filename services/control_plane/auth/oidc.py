"""Accepts tokens of an OpenID Connect issuer in place of API keys.

A token must be signed by the issuer, name this service as its audience, and not have expired.
"""

import asyncio
import logging
import math
import time
from collections.abc import Collection, Mapping
from typing import Any

import httpx
import jwt

from services.control_plane.auth.keys import Caller, known
from services.control_plane.core.errors import Unauthorized, Unavailable
from services.control_plane.settings import Settings

log = logging.getLogger(__name__)

ALGORITHMS = ["RS256", "ES256"]  # fixed here, because a token must not choose `none` or a shared secret
REQUIRED = ["exp", "iss", "aud", "sub"]
LEEWAY_SECONDS = 60  # the issuer's clock may differ from ours by this much
FRESH_SECONDS = 300  # how long the issuer's keys are cached
PAUSE_SECONDS = 5  # the shortest time between two requests to the issuer, however many wrong tokens arrive
# The errors of reading the issuer's documents if the issuer does not answer, or gives no usable answer:
UNREADABLE = (httpx.HTTPError, httpx.InvalidURL, jwt.PyJWTError, ValueError, LookupError, TypeError, AttributeError)


class Issuer:
    """The OpenID Connect issuer from the settings, whose tokens the service accepts.

    If the issuer does not answer, the public keys that it last published stay in use.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.http = httpx.AsyncClient(timeout=5)
        self._about: Mapping[str, Any] = {}
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = self._asked_at = -math.inf
        self._asking = asyncio.Lock()

    @staticmethod
    def is_token(text: str) -> bool:
        """Whether a text has the form of a JWT, which has two dots. API keys of this service have no dots."""
        return text.count(".") == 2

    async def close(self) -> None:
        await self.http.aclose()

    async def caller(self, token: str) -> Caller:
        """Checks a JWT, and returns the caller that it names. Does not check that the caller's project exists.

        Raises Unauthorized if the token is not valid, and Unavailable if the issuer does not answer.
        """
        claims = await self.claims(token, self._settings.oidc_audiences)
        return self._caller_by_role(claims) if self._settings.oidc_roles else self._caller_by_claims(claims)

    async def claims(self, token: str, audiences: Collection[str]) -> dict[str, Any]:
        """Checks a JWT, which must name one of the audiences, and returns its claims.

        Raises Unauthorized if the token is not valid, and Unavailable if the issuer does not answer.
        """
        try:
            header = jwt.get_unverified_header(token)
            claims: dict[str, Any] = jwt.decode(
                token,
                await self._key(str(header.get("kid"))),
                algorithms=ALGORITHMS,
                audience=audiences,
                issuer=self._settings.oidc_issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": REQUIRED},
            )
            self._check_party(claims)
        except jwt.PyJWTError as error:
            raise Unauthorized(
                f"The token is not accepted: {error}. Send a new token from the issuer, or an API key.",
                code="invalid_api_key",
            ) from None
        return claims

    def _check_party(self, claims: Mapping[str, Any]) -> None:
        """Raises InvalidAudienceError if a token is for the page's client, but was issued to another client.

        The claim `azp` (authorized party) names the client to which the issuer gave the token. It may be missing if the
        token has one audience. A token for `oidc_audience` may have been issued to any client.
        """
        client, party = self._settings.oidc_client_id, claims.get("azp")
        audiences = [claims["aud"]] if isinstance(claims["aud"], str) else claims["aud"]
        if self._settings.oidc_audience in audiences or party == client:
            return
        if party is not None or len(audiences) > 1:
            raise jwt.InvalidAudienceError(f"its claim 'azp' must be the client '{client}', which is its audience")

    async def endpoint(self, name: str) -> str:
        """Returns the URL of the issuer's endpoint `name`, such as `token_endpoint`, from its discovery document.

        Raises Unavailable if the issuer has never answered, or has no such endpoint.
        """
        await self._update(None)
        if not isinstance(url := self._about.get(name), str):
            raise self.unavailable()
        return url

    async def _key(self, name: str) -> jwt.PyJWK:
        """Returns the issuer's public key with the id `name`. Fetches the issuer's keys first if they are old or lack
        this id.

        PyJWT's own client would block all requests of this process while it waits for the issuer.
        """
        await self._update(name)
        if key := self._keys.get(name):
            return key
        if not self._keys:
            raise self.unavailable()
        raise jwt.InvalidKeyError("it is signed with a key that the issuer has not published")

    def unavailable(self) -> Unavailable:
        """Returns the error to raise if a request needs the issuer, but the issuer does not answer or refuses this
        service."""
        message = "The issuer of the tokens does not answer, or gives no answer that the service can use."
        message = f"{message} Try again in {PAUSE_SECONDS} seconds, or use an API key."
        return Unavailable(message, retry_after=PAUSE_SECONDS, code="issuer_unavailable")

    async def _update(self, name: str | None) -> None:
        """Fetches the issuer's discovery document and public keys if they are old or missing, or if the key `name` is
        missing.

        If `name` is None, no particular key is needed.
        """
        if self._is_due(name) and not (self._has(name) and self._asking.locked()):
            async with self._asking:
                if self._is_due(name):
                    await self._ask()
                    self._asked_at = time.monotonic()

    def _has(self, name: str | None) -> bool:
        return bool(self._keys) if name is None else name in self._keys

    def _is_due(self, name: str | None) -> bool:
        """Whether to ask the issuer for its public keys now, because the key with the id `name` is missing, or the keys
        are old.

        If `name` is None, any key will do. Returns False if the issuer was asked only seconds ago.
        """
        now = time.monotonic()
        wanted = not self._has(name) or now - self._fetched_at > FRESH_SECONDS
        return wanted and now - self._asked_at > PAUSE_SECONDS

    async def _ask(self) -> None:
        """Fetches the issuer's discovery document, and then the issuer's keys from the URL in this document."""
        issuer = self._settings.oidc_issuer or ""
        try:
            about = await self._get(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
            if about["issuer"] != issuer:
                raise ValueError(f"the issuer gives its name as {about['issuer']}; correct the setting oidc_issuer")
            published = jwt.PyJWKSet.from_dict(await self._get(about["jwks_uri"]))
        except UNREADABLE as error:
            log.warning("The public keys of the OpenID issuer %s could not be fetched: %r", issuer, error)
            return
        usable = [key for key in published.keys if key.public_key_use in ("sig", None)]
        self._keys, self._about = {key.key_id: key for key in usable if key.key_id}, about
        self._fetched_at = time.monotonic()

    async def _get(self, url: str) -> Any:
        return (await self.http.get(url)).raise_for_status().json()

    def _caller_by_role(self, claims: Mapping[str, Any]) -> Caller:
        """Returns the caller that a token's claims describe. The setting `oidc_roles` gives the caller's project and
        scopes (permissions) for each value of one claim, which the setting `oidc_roles_claim` names.

        Raises Unauthorized, which names the claim, if none of the claim's values is in `oidc_roles`.
        """
        name, given = self._settings.oidc_roles_claim, claims.get(self._settings.oidc_roles_claim)
        values = [given] if isinstance(given, str) else given if isinstance(given, list) else []
        roles = [role for role in self._settings.oidc_roles if role.value in values]
        if not roles:
            has = f"has {', '.join(map(repr, values))[:200]}" if values else "is missing or empty"
            raise Unauthorized(
                f"The token gives no role: its claim '{name}' {has}, which matches no role in the setting oidc_roles. "
                "Ask the service's operator for a role.",
                code="invalid_api_key",
            )
        project = roles[0].project
        scopes = frozenset(scope for role in roles if role.project == project for scope in role.scopes)
        return Caller(f"oidc:{claims['sub']}", project, scopes, project_claim=name, scopes_claim=name)

    def _caller_by_claims(self, claims: Mapping[str, Any]) -> Caller:
        """Returns the caller whose project is in one of the token's claims, and whose scopes (permissions) are in
        another one.

        The claim of scopes is a list of words, or a text with spaces between the words. Words that are no scopes of
        this service are ignored. Raises Unauthorized if the claim of the project is missing.
        """
        name, scopes_claim = self._settings.oidc_project_claim, self._settings.oidc_scopes_claim
        if not isinstance(project_id := claims.get(name), str):
            message = f"The token names no project; its claim '{name}' must be the id of a project."
            raise Unauthorized(message, code="invalid_api_key")
        given = claims.get(scopes_claim)
        scopes = known(given.split() if isinstance(given, str) else given if isinstance(given, list) else [])
        return Caller(f"oidc:{claims['sub']}", project_id, scopes, project_claim=name, scopes_claim=scopes_claim)

"""Signs people in at the OpenID Connect issuer, by the authorization code flow with PKCE.

The web page sends a person to the issuer, which sends the person back with a code. The service exchanges the code for
tokens. So the scripts of the page talk to the service only, and the secret of the OpenID Connect client does not reach
the browser.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from services.control_plane.auth.oidc import Issuer
from services.control_plane.core.errors import Unauthorized, Unavailable
from services.control_plane.settings import Settings

log = logging.getLogger(__name__)

AT_ONCE = 8  # the most exchanges at the same time, because anybody may request one, and each asks the issuer
WAITING = 32  # the most further exchanges that wait for their turn
BUSY_SECONDS = 5  # the time after which a client may try again if its exchange could not even wait
LONGEST = 300  # the most characters of the issuer's error that our error quotes


@dataclass(frozen=True)
class SignedIn:
    """Holds the tokens of a person who signed in. `id_token` serves in place of an API key until `expires_at`, in Unix
    seconds.

    `refresh_token` is the token with which to get the next ID token; None if the issuer gave none.
    """

    id_token: str
    refresh_token: str | None
    expires_at: int
    name: str


class CodeFlow:
    """Exchanges codes and refresh tokens for ID tokens, at the issuer's token endpoint."""

    def __init__(self, issuer: Issuer, settings: Settings) -> None:
        self._issuer, self._settings = issuer, settings
        self._turns, self._num_begun = asyncio.Semaphore(AT_ONCE), 0

    async def request(self) -> dict[str, str]:
        """Returns the issuer's authorization endpoint (`authorization_endpoint`), and the parameters of every request
        to this endpoint (`client_id` and `scope`).

        Raises Unavailable if the issuer does not answer.
        """
        return {
            "authorization_endpoint": await self._issuer.endpoint("authorization_endpoint"),
            "client_id": self._settings.oidc_client_id or "",
            "scope": self._settings.oidc_requested_scopes,
        }

    async def exchange(self, form: Mapping[str, str], nonce: str | None) -> SignedIn:
        """Sends the form to the token endpoint, and returns the tokens of the answer.

        `form` holds a grant as RFC 6749 defines it. `nonce` is the value that the ID token must repeat; None if the
        grant is a refresh token. Raises Unauthorized if the code or the refresh token can no longer be used, or if the
        ID token is not valid. Raises Unavailable if the issuer does not answer or refuses for another reason, or if too
        many exchanges wait.
        """
        if self._num_begun >= AT_ONCE + WAITING:
            message = f"Too many people sign in at this moment. Try again in {BUSY_SECONDS} seconds."
            raise Unavailable(message, retry_after=BUSY_SECONDS, code="overloaded")
        self._num_begun += 1
        try:
            async with self._turns:
                told = await self._post(await self._issuer.endpoint("token_endpoint"), form)
        finally:
            self._num_begun -= 1
        token = told.get("id_token")
        if not isinstance(token, str):
            raise _refused("it gave no ID token")
        claims = await self._issuer.claims(token, [self._settings.oidc_client_id or ""])
        if nonce is not None and claims.get("nonce") != nonce:
            raise _refused("its ID token belongs to another sign-in")
        refresh_token = told.get("refresh_token") or form.get("refresh_token")  # an issuer may keep the old one
        name = next(str(claims[each]) for each in ("name", "preferred_username", "email", "sub") if claims.get(each))
        return SignedIn(token, refresh_token, int(claims["exp"]), name)

    async def _post(self, url: str, form: Mapping[str, str]) -> Mapping[str, Any]:
        client, secret = self._settings.oidc_client_id or "", self._settings.oidc_client_secret
        credentials = (quote(client, safe=""), quote(secret.get_secret_value(), safe="")) if secret else None
        try:
            answer = await self._issuer.http.post(
                url, data={**form, "client_id": client}, auth=credentials or httpx.USE_CLIENT_DEFAULT
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            log.warning("The token endpoint %s does not answer: %r", url, error)
            raise self._issuer.unavailable() from None
        told = _object_of(answer)
        if told and answer.is_success:
            return told
        if answer.is_client_error and told.get("error") == "invalid_grant":
            said = (str(told[name])[:LONGEST] for name in ("error", "error_description") if told.get(name))
            raise _refused(": ".join(said))
        name = str(told.get("error"))[:LONGEST]
        log.warning("The token endpoint %s answered with status %d and error %r", url, answer.status_code, name)
        raise self._issuer.unavailable()


def _object_of(answer: httpx.Response) -> Mapping[str, Any]:
    """Returns the JSON object in the answer's body. Returns an empty one if the body is anything else."""
    try:
        told = answer.json()
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _refused(reason: str) -> Unauthorized:
    return Unauthorized(f"The issuer did not sign you in: {reason}. Sign in again.", code="sign_in_refused")

"""Tests the exchange of codes and refresh tokens with a provider on loopback."""

import asyncio
import base64
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest
from pydantic import SecretStr

from services.control_plane.auth.code_flow import AT_ONCE, CodeFlow, SignedIn
from services.control_plane.auth.oidc import Issuer
from services.control_plane.core.errors import Unauthorized, Unavailable
from services.control_plane.settings import Settings
from tests.services.idp import CLIENT, SECRET, Idp
from tests.services.web import running

BACK = "http://127.0.0.1:9/"
Result = TypeVar("Result")


@pytest.fixture
def idp() -> Iterator[Idp]:
    with running(Idp()) as idp:
        idp.redirect_uris = {BACK}
        yield idp


@pytest.fixture
def settings(offline: Settings, idp: Idp) -> Settings:
    return offline.model_copy(update={"oidc_issuer": idp.issuer, "oidc_client_id": CLIENT})


def use(settings: Settings, act: Callable[[CodeFlow], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        issuer = Issuer(settings)
        try:
            return await act(CodeFlow(issuer, settings))
        finally:
            await issuer.close()

    return asyncio.run(run())


def consented(idp: Idp, verifier: str = "v" * 43, **changes: str) -> dict[str, str]:
    """Returns the form of the grant that Ada consented to at the provider."""
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    asked = {
        "client_id": CLIENT,
        "redirect_uri": BACK,
        "response_type": "code",
        "scope": "openid",
        "state": secrets.token_urlsafe(),
        "nonce": "once",
        "code_challenge": challenge,
        "code_challenge_method": "S256",
    }
    form = {"grant_type": "authorization_code", "code": idp.code(asked), "code_verifier": verifier}
    return {**form, "redirect_uri": BACK, **changes}


def exchange(settings: Settings, form: dict[str, str], nonce: str | None = "once") -> SignedIn:
    return use(settings, lambda flow: flow.exchange(form, nonce))


def test_the_request_names_the_issuer_s_endpoint_and_the_client(settings: Settings, idp: Idp) -> None:
    endpoint = f"{idp.url}/authorization"
    told = {"authorization_endpoint": endpoint, "client_id": CLIENT, "scope": "openid profile"}
    assert use(settings, lambda flow: flow.request()) == told


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_code_becomes_tokens_and_a_refresh_token_the_next_ones(
    settings: Settings, idp: Idp, secret: str | None
) -> None:
    idp.secret = secret
    known = settings.model_copy(update={"oidc_client_secret": SecretStr(secret) if secret else None})
    first = exchange(known, consented(idp))
    assert first.name == "Ada Lovelace"
    next_form = {"grant_type": "refresh_token", "refresh_token": first.refresh_token or ""}
    second = exchange(known, next_form, None)
    assert second.refresh_token not in (None, first.refresh_token)
    assert second.expires_at >= first.expires_at
    with pytest.raises(Unauthorized, match="invalid_grant: The refresh token was used before"):
        exchange(known, next_form, None)
    assert not secret or secret not in str(idp.forms)


@pytest.mark.parametrize(
    ("changes", "nonce", "said"),
    [
        ({"code": "another"}, "once", "invalid_grant: The code is not valid"),
        ({"code_verifier": "w" * 43}, "once", "invalid_grant"),
        ({"redirect_uri": "http://127.0.0.1:9/elsewhere"}, "once", "invalid_grant"),
        ({}, "another", "its ID token belongs to another sign-in"),
    ],
)
def test_a_grant_that_is_not_of_this_sign_in_is_refused(
    settings: Settings, idp: Idp, changes: dict[str, str], nonce: str, said: str
) -> None:
    with pytest.raises(Unauthorized, match=said) as refused:
        exchange(settings, consented(idp, **changes), nonce)
    assert refused.value.code == "sign_in_refused" or not changes


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ({"aud": "raydpo"}, "Audience doesn't match"),
        ({"iss": "https://elsewhere.example"}, "Invalid issuer"),
        ({"exp": 1}, "Signature has expired"),
        ({"key": "hidden"}, "signed with a key that the issuer has not published"),
        ({"alg": "HS256", "kid": "rsa"}, "alg value is not allowed"),
    ],
)
def test_an_id_token_is_checked_as_any_token(settings: Settings, idp: Idp, claims: dict[str, Any], said: str) -> None:
    idp.claims = claims
    with pytest.raises(Unauthorized, match=said):
        exchange(settings.model_copy(update={"oidc_audience": "raydpo"}), consented(idp))


def test_a_client_that_the_issuer_does_not_know_is_told_so(settings: Settings, idp: Idp) -> None:
    idp.secret = SECRET
    with pytest.raises(Unauthorized, match="invalid_client"):
        exchange(settings, consented(idp))


def test_an_issuer_that_does_not_answer_is_unavailable(settings: Settings, idp: Idp) -> None:
    with pytest.raises(Unavailable):
        exchange(settings.model_copy(update={"oidc_issuer": f"{idp.url}/nowhere"}), consented(idp))


def test_strangers_cannot_make_it_ask_the_issuer_many_times_at_once(settings: Settings, idp: Idp) -> None:
    at_once = most = 0
    answer = idp.answer

    def counted(form: dict[str, str], credentials: str) -> tuple[int, dict[str, Any]]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        told = answer(form, credentials)
        at_once -= 1
        return told

    idp.answer = counted  # type: ignore[method-assign]

    async def flood(flow: CodeFlow) -> list[SignedIn | BaseException]:
        form = {"grant_type": "refresh_token", "refresh_token": "stolen"}
        return await asyncio.gather(*(flow.exchange(form, None) for _ in range(50)), return_exceptions=True)

    assert all(isinstance(each, Unauthorized) for each in use(settings, flood))
    assert 0 < most <= AT_ONCE
    assert len(idp.forms) == 50

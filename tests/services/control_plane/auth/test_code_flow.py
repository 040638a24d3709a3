"""Tests the exchange of codes and refresh tokens with a provider on loopback."""

import asyncio
import base64
import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest
from pydantic import SecretStr

from services.control_plane.auth.code_flow import AT_ONCE, WAITING, CodeFlow, SignedIn
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
    assert refused.value.code == "sign_in_refused"


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


def test_a_client_that_the_issuer_does_not_know_is_the_operator_s_trouble(
    settings: Settings, idp: Idp, caplog: pytest.LogCaptureFixture
) -> None:
    idp.secret = SECRET
    form = consented(idp)
    with pytest.raises(Unavailable) as refused, caplog.at_level(logging.WARNING):
        exchange(settings, form)
    assert refused.value.code == "issuer_unavailable"
    assert f"{idp.url}/token answered with status 401 and error 'invalid_client'" in caplog.text
    assert not [name for name in ("code", "code_verifier") if form[name] in caplog.text]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": "invalid_request"}),
        (403, {"error": "slow_down"}),
        (429, {}),
        (500, {"error": "invalid_grant"}),
        (400, ["invalid_grant"]),
        (200, ["no object"]),
    ],
)
def test_only_a_dead_grant_ends_a_sign_in(
    settings: Settings, idp: Idp, monkeypatch: pytest.MonkeyPatch, status: int, body: Any
) -> None:
    monkeypatch.setattr(idp, "answer", lambda form, credentials: (status, body))
    with pytest.raises(Unavailable):
        exchange(settings, consented(idp))


def test_an_endpoint_that_is_no_url_is_unavailable(
    settings: Settings, idp: Idp, caplog: pytest.LogCaptureFixture
) -> None:
    form, place = consented(idp), "/realms/a/.well-known/openid-configuration"
    idp.files[place] = json.dumps(json.loads(idp.files[place]) | {"token_endpoint": "https://host:port"}).encode()
    with pytest.raises(Unavailable):
        exchange(settings, form)
    assert "https://host:port does not answer: InvalidURL" in caplog.text


def test_an_issuer_that_does_not_answer_is_unavailable(settings: Settings, idp: Idp) -> None:
    with pytest.raises(Unavailable):
        exchange(settings.model_copy(update={"oidc_issuer": f"{idp.url}/nowhere"}), consented(idp))


def test_strangers_cannot_make_it_ask_the_issuer_many_times_at_once(
    settings: Settings, idp: Idp, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, released = threading.Semaphore(0), threading.Event()
    answer = idp.answer

    def held(form: dict[str, str], credentials: str) -> tuple[int, dict[str, Any]]:
        entered.release()
        released.wait(300)
        return answer(form, credentials)

    async def enters(seconds: float) -> bool:
        return await asyncio.to_thread(entered.acquire, timeout=seconds)

    async def flood(flow: CodeFlow) -> None:
        form = {"grant_type": "refresh_token", "refresh_token": "stolen"}
        sent = [asyncio.ensure_future(flow.exchange(form, None)) for _ in range(AT_ONCE + WAITING)]
        try:
            assert all([await enters(300) for _ in range(AT_ONCE)])
            assert not await enters(0.5)
            with pytest.raises(Unavailable) as refused:
                await flow.exchange(form, None)
            assert (refused.value.code, refused.value.headers) == ("overloaded", {"retry-after": "5"})
        finally:
            released.set()
            ended = await asyncio.gather(*sent, return_exceptions=True)
        assert {type(each) for each in ended} == {Unauthorized}
        assert len(idp.forms) == AT_ONCE + WAITING
        with pytest.raises(Unauthorized):
            await flow.exchange(form, None)

    monkeypatch.setattr(idp, "answer", held)
    use(settings, flood)

"""Tests tokens of an OpenID Connect issuer, a server on loopback that publishes real keys."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from services.control_plane.auth import oidc
from services.control_plane.auth.keys import Caller
from services.control_plane.auth.oidc import Issuer
from services.control_plane.core.errors import Unauthorized, Unavailable
from services.control_plane.settings import Role, Settings
from tests.services.control_plane.conftest import api_of, new_project
from tests.services.idp import AUDIENCE, CLIENT, Idp
from tests.services.web import running


@pytest.fixture(scope="module")
def idp() -> Iterator[Idp]:
    with running(Idp()) as idp:
        yield idp


@pytest.fixture(scope="module")
def settings(offline: Settings, idp: Idp) -> Settings:
    return offline.model_copy(update={"oidc_issuer": idp.issuer, "oidc_audience": AUDIENCE})


ROLES = [
    Role(value="ml", project="proj_shop", scopes=["read"]),
    Role(value="ml leads", project="proj_shop", scopes=["admin"]),
    Role(value="lab", project="proj_lab", scopes=["write"]),
]


def ask(base_url: str, token: str, path: str = "/files", method: str = "GET") -> httpx.Response:
    with api_of(base_url, token) as api:
        return api.request(method, path)


@pytest.mark.parametrize("key", ["rsa", "ec"])
def test_a_token_of_the_issuer_works_as_its_claims_say(base_url: str, idp: Idp, key: str) -> None:
    token = idp.token(key)
    assert ask(base_url, token).status_code == 200
    assert ask(base_url, token, "/fine_tuning/jobs/ftjob-none/cancel", "POST").status_code == 404
    refused = ask(base_url, token, "/x/keys")
    assert refused.status_code == 403
    assert "your token has the scopes read, write, from its claim 'scope'" in refused.json()["error"]["message"]
    assert ask(base_url, idp.token(key, scope=["admin"]), "/x/keys").status_code == 200
    assert ask(base_url, idp.token(key, scope=None)).status_code == 403


def test_a_token_is_of_its_project_while_that_lives(api: httpx.Client, base_url: str, idp: Idp) -> None:
    project = new_project(api, "of tokens")
    token = idp.token(project=project, scope="admin")
    assert [each["id"] for each in ask(base_url, token, "/x/projects").json()["data"]] == [project]
    api.post(f"/x/projects/{project}/archive")
    assert ask(base_url, idp.token(project=project)).status_code == 401


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"key": "hidden"}, "signed with a key that the issuer has not published"),
        ({"key": "hidden", "kid": "rsa"}, "Signature verification failed"),
        ({"aud": "another"}, "Audience doesn't match"),
        ({"aud": None}, 'missing the "aud" claim'),
        ({"iss": "https://elsewhere.example"}, "Invalid issuer"),
        ({"exp": None}, 'missing the "exp" claim'),
        ({"exp": time.time() - 61}, "Signature has expired"),
        ({"nbf": time.time() + 86_400}, "not yet valid"),
        ({"sub": None}, 'missing the "sub" claim'),
        ({"alg": "HS256", "kid": "rsa"}, "alg value is not allowed"),
        ({"alg": "none", "kid": "rsa"}, "alg value is not allowed"),
        ({"project": None}, "its claim 'project' must be the id of a project"),
        ({"project": "proj_none"}, "claim 'project' leads to the project 'proj_none', which does not exist"),
    ],
)
def test_any_other_token_is_a_wrong_key(base_url: str, idp: Idp, changes: dict[str, Any], said: str) -> None:
    answer = ask(base_url, idp.token(**changes))
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert said in answer.json()["error"]["message"]


def test_a_clock_that_differs_by_less_than_a_minute_is_no_matter(base_url: str, idp: Idp) -> None:
    assert ask(base_url, idp.token(exp=time.time() - 30)).status_code == 200


@pytest.mark.parametrize("text", ["a.b.c", "..", "eyJhbGciOiJSUzI1NiJ9.e30.AA", "é.é.é"])
def test_what_only_looks_like_a_token_is_a_wrong_key(settings: Settings, text: str) -> None:
    with pytest.raises(Unauthorized):
        callers(settings, [text])


def callers(settings: Settings, tokens: list[str], before_each: Any = lambda number: None) -> list[Caller]:
    async def find() -> list[Caller]:
        issuer, found = Issuer(settings), []
        for number, token in enumerate(tokens):
            before_each(number)
            found.append(await issuer.caller(token))
        await issuer.close()
        return found

    return asyncio.run(find())


def test_roles_come_from_the_values_of_a_claim(settings: Settings, idp: Idp) -> None:
    by_role = settings.model_copy(update={"oidc_roles": ROLES, "oidc_client_id": CLIENT})
    groups = [["ml"], ["strangers", "ml"], ["lab", "ml", "ml leads"], "ml leads", ["ml leads", "lab"]]
    tokens = [idp.token(aud=aud, groups=each) for each in groups for aud in (AUDIENCE, CLIENT)]
    found = [(caller.project_id, caller.scopes) for caller in callers(by_role, tokens)][::2]
    shop, leads = ("proj_shop", {"read"}), ("proj_shop", {"read", "admin"})
    assert found == [shop, shop, leads, ("proj_shop", {"admin"}), ("proj_shop", {"admin"})]


@pytest.mark.parametrize(
    ("aud", "azp", "is_accepted"),
    [
        (CLIENT, None, True),
        (CLIENT, CLIENT, True),
        ([CLIENT, "another"], CLIENT, True),
        (AUDIENCE, "another", True),
        ([AUDIENCE, CLIENT], "another", True),
        (CLIENT, "another", False),
        ([CLIENT, "another"], "another", False),
        ([CLIENT, "another"], None, False),
    ],
)
def test_a_token_for_the_page_was_issued_to_the_page(
    settings: Settings, idp: Idp, aud: str | list[str], azp: str | None, is_accepted: bool
) -> None:
    of_page, token = settings.model_copy(update={"oidc_client_id": CLIENT}), idp.token(aud=aud, azp=azp)
    if is_accepted:
        assert [caller.key_id for caller in callers(of_page, [token])] == ["oidc:ada"]
    else:
        with pytest.raises(Unauthorized, match="its claim 'azp' must be the client 'raydpo-page'"):
            callers(of_page, [token])


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (["strangers", "guests"], "its claim 'groups' has 'strangers', 'guests'"),
        (None, "its claim 'groups' is missing or empty"),
        ({"ml": True}, "its claim 'groups' is missing or empty"),
    ],
)
def test_a_token_without_a_role_is_refused_by_its_claim(settings: Settings, idp: Idp, groups: Any, said: str) -> None:
    with pytest.raises(Unauthorized, match=said):
        callers(settings.model_copy(update={"oidc_roles": ROLES}), [idp.token(groups=groups)])


def test_keys_are_kept_through_an_outage_and_fetched_again_when_they_rotate(
    settings: Settings, idp: Idp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "PAUSE_SECONDS", 0)
    idp.requests.clear()

    def change(number: int) -> None:
        if number == 2:
            idp.statuses["/realms/a/.well-known/openid-configuration"] = [500] * 2
            monkeypatch.setattr(oidc, "FRESH_SECONDS", 0)  # the keys are due, and the issuer is down
        if number == 4:
            idp.publish("hidden")

    found = callers(settings, [idp.token(), idp.token(), idp.token(), idp.token(), idp.token("hidden")], change)
    assert [caller.key_id for caller in found] == ["oidc:ada"] * 5
    assert [path for path, _ in idp.requests].count("/keys") == 2
    idp.publish("rsa", "ec")


def test_strangers_cannot_make_it_ask_the_issuer_more_often(settings: Settings, idp: Idp) -> None:
    idp.requests.clear()

    async def flood() -> None:
        issuer = Issuer(settings)
        answers = await asyncio.gather(
            *(issuer.caller(idp.token("hidden", kid=f"unknown-{i}")) for i in range(50)), return_exceptions=True
        )
        assert all(isinstance(answer, Unauthorized) for answer in answers)
        await issuer.close()

    asyncio.run(flood())
    assert len(idp.requests) == 2


def test_an_issuer_that_never_answered_makes_tokens_unknown_not_wrong(settings: Settings, idp: Idp) -> None:
    with pytest.raises(Unavailable):
        callers(settings.model_copy(update={"oidc_issuer": f"{idp.url}/nowhere"}), [idp.token()])


def test_an_issuer_whose_keys_are_at_no_url_is_unavailable(settings: Settings, idp: Idp) -> None:
    about = {"issuer": f"{idp.url}/realms/b", "jwks_uri": "https://host:port"}
    idp.files["/realms/b/.well-known/openid-configuration"] = json.dumps(about).encode()
    with pytest.raises(Unavailable):
        callers(settings.model_copy(update={"oidc_issuer": about["issuer"]}), [idp.token()])


def test_without_the_settings_a_token_is_a_wrong_key(offline: Settings, idp: Idp) -> None:
    assert offline.oidc_issuer is None
    with pytest.raises(ValueError, match="http"):
        Settings(**{**offline.model_dump(), "oidc_issuer": "http://issuer.example", "oidc_audience": "a"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"oidc_issuer": "https://issuer.example"}, "oidc_issuer needs oidc_audience, oidc_client_id or both"),
        ({"oidc_client_id": "a"}, "need oidc_issuer"),
        ({"oidc_roles": ROLES}, "need oidc_issuer"),
        ({"oidc_issuer": "https://a.b", "oidc_audience": "a", "oidc_client_secret": "b"}, "needs oidc_client_id"),
        ({"oidc_roles": [{"value": "a", "project": "b", "scopes": ["all"]}]}, "oidc_roles.0.scopes.0"),
        ({"oidc_requested_scopes": "profile"}, "oidc_requested_scopes"),
        ({"oidc_issuer": "https://a.b", "oidc_audience": ""}, "oidc_audience"),
        ({"oidc_issuer": "https://a.b", "oidc_client_id": ""}, "oidc_client_id"),
        ({"oidc_issuer": "https://host:port", "oidc_audience": "a"}, "a port that is not a number"),
        ({"oidc_issuer": "https:///realm", "oidc_audience": "a"}, "the URL has no host"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(offline: Settings, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(**{**offline.model_dump(), **given})

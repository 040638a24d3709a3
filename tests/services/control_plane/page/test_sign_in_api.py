"""Tests the routes of signing in, with a provider on loopback."""

from collections.abc import Iterator

import httpx
import pytest
from sqlalchemy.engine import make_url

from services.control_plane.settings import Role, Settings
from tests.services.control_plane.auth.test_code_flow import BACK, consented
from tests.services.control_plane.conftest import answering
from tests.services.control_plane.http.test_documented_answers import check as documented
from tests.services.idp import CLIENT, Idp
from tests.services.proxy import Proxy
from tests.services.web import running


@pytest.fixture(scope="module")
def idp() -> Iterator[Idp]:
    with running(Idp()) as idp:
        idp.redirect_uris = {BACK}
        yield idp


@pytest.fixture(scope="module")
def settings(offline: Settings, idp: Idp) -> Settings:
    roles = [Role(value="ml", project="proj_default", scopes=["read", "write"])]
    return offline.model_copy(update={"oidc_issuer": idp.issuer, "oidc_client_id": CLIENT, "oidc_roles": roles})


def exchange(base_url: str, idp: Idp) -> httpx.Response:
    grant = {name: value for name, value in consented(idp).items() if name != "grant_type"}
    return httpx.post(f"{base_url}/v1/x/sign-in/token", json=grant | {"nonce": "once"})


def test_a_person_signs_in_and_may_do_what_the_role_says(base_url: str, idp: Idp) -> None:
    told = documented("get", "/x/sign-in", httpx.get(f"{base_url}/v1/x/sign-in"))
    assert told["oidc"] == {
        "authorization_endpoint": f"{idp.url}/authorization",
        "client_id": CLIENT,
        "scope": "openid profile",
    }
    idp.claims = {"name": "Ada", "groups": ["ml"]}
    answer = exchange(base_url, idp)
    signed_in = documented("post", "/x/sign-in/token", answer)
    assert answer.headers["cache-control"] == "no-store"
    assert (signed_in["name"], signed_in["project_id"], signed_in["scopes"]) == (
        "Ada",
        "proj_default",
        ["read", "write"],
    )
    headers = {"Authorization": f"Bearer {signed_in['token']}"}
    assert httpx.get(f"{base_url}/v1/files", headers=headers).status_code == 200
    refused = httpx.get(f"{base_url}/v1/x/keys", headers=headers).json()["error"]
    assert refused["code"] == "missing_scope"
    assert "from its claim 'groups'" in refused["message"]
    refreshed = httpx.post(f"{base_url}/v1/x/sign-in/refresh", json={"refresh_token": signed_in["refresh_token"]})
    assert documented("post", "/x/sign-in/refresh", refreshed)["project_id"] == "proj_default"


def test_a_person_without_a_role_is_refused_by_the_claim(base_url: str, idp: Idp) -> None:
    idp.claims = {"name": "Eve", "groups": ["guests"]}
    answer = exchange(base_url, idp)
    assert answer.status_code == 401
    assert "its claim 'groups' has 'guests'" in answer.json()["error"]["message"]


def test_a_database_that_is_down_costs_nobody_the_sign_in(settings: Settings, idp: Idp) -> None:
    idp.claims = {"name": "Ada", "groups": ["ml"]}
    database = make_url(settings.database_url)
    proxy = Proxy(f"{database.query['host']}/.s.PGSQL.5432")
    distant = f"postgresql://postgres@127.0.0.1:{proxy.port}/{database.database}"
    try:
        with answering(settings.model_copy(update={"database_url": distant})) as base_url:
            refresh_token = exchange(base_url, idp).json()["refresh_token"]
            proxy.refusing = True
            proxy.cut()
            body = {"refresh_token": refresh_token}
            answer = httpx.post(f"{base_url}/v1/x/sign-in/refresh", json=body, timeout=60)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
            assert refresh_token in idp.refresh_tokens
    finally:
        proxy.close()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "refresh_token"),
        ({"refresh_token": "x" * 8193}, "refresh_token"),
        ({"refresh_token": "x", "scope": "all"}, "scope"),
    ],
)
def test_a_body_that_is_no_grant_is_refused_by_its_field(base_url: str, body: dict[str, str], param: str) -> None:
    answer = httpx.post(f"{base_url}/v1/x/sign-in/refresh", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_without_an_issuer_there_is_nothing_to_sign_in_at(offline: Settings) -> None:
    with answering(offline) as base_url:
        assert httpx.get(f"{base_url}/v1/x/sign-in").json() == {"object": "sign_in", "oidc": None}
        answer = httpx.post(f"{base_url}/v1/x/sign-in/refresh", json={"refresh_token": "any"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "sign_in_not_configured")

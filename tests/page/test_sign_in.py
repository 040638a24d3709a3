"""Signing in at an OpenID Connect provider on loopback, whose only user is Ada."""

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, Route, expect

from tests.page.browsing import look_at, sign_in
from tests.page.conftest import Service
from tests.services.idp import CLIENT, SECRET, Idp
from tests.services.web import running

pytestmark = pytest.mark.slow
BUTTON = "Sign in with your organization"
EXPIRE = """() => {
    const kept = JSON.parse(sessionStorage["raydpo session"]);
    sessionStorage["raydpo session"] = JSON.stringify({...kept, issued: {...kept.issued, expiresAt: 0}});
}"""


@pytest.fixture(scope="module")
def idp() -> Iterator[Idp]:
    with running(Idp()) as idp:
        idp.secret = SECRET
        yield idp


@pytest.fixture(scope="module")
def more_settings(idp: Idp) -> dict[str, str]:
    roles = [{"value": "ml", "project": "proj_default", "scopes": ["read", "write"]}]
    return {
        "RAYDPO_OIDC_ISSUER": idp.issuer,
        "RAYDPO_OIDC_CLIENT_ID": CLIENT,
        "RAYDPO_OIDC_CLIENT_SECRET": SECRET,
        "RAYDPO_OIDC_ROLES": json.dumps(roles),
    }


@pytest.fixture(autouse=True)
def ada(idp: Idp, service: Service) -> None:
    idp.redirect_uris = {f"{service.url}/"}
    idp.claims, idp.seconds = {"name": "Ada Lovelace", "groups": ["ml"]}, 300
    idp.secret = SECRET


def sign_in_at_the_issuer(page: Page) -> None:
    page.get_by_role("button", name=BUTTON).click()
    page.get_by_role("link", name="Go on as Ada").click()
    expect(page.get_by_text("Ada Lovelace")).to_be_visible()


def expire(page: Page) -> None:
    """Opens the page anew with a token that is about to expire."""
    page.evaluate(EXPIRE)
    page.reload()


def test_a_person_signs_in_at_the_issuer_and_comes_back_to_the_view(page: Page, service: Service, idp: Idp) -> None:
    look_at(page, "sign-in-issuer")
    page.goto(f"{service.url}/#/data")
    sign_in_at_the_issuer(page)
    expect(page.get_by_role("heading", name="Data")).to_be_visible()
    assert page.url == f"{service.url}/#/data"
    look_at(page, "signed-in")
    page.reload()
    expect(page.get_by_role("heading", name="Data")).to_be_visible()
    assert page.evaluate("localStorage.length") == 0
    token = page.evaluate("JSON.parse(sessionStorage.getItem('raydpo session')).token")
    log = service.logged()
    assert "POST /v1/x/sign-in/token 200" in log
    for secret in (token, SECRET, idp.forms[-1]["code"], idp.forms[-1]["code_verifier"]):
        assert secret not in log
    page.goto(f"{service.url}/#/admin/keys")
    expect(page.get_by_role("alert")).to_contain_text("from its claim 'groups'")


def test_a_token_is_renewed_before_it_expires(page: Page, service: Service, idp: Idp) -> None:
    idp.seconds = 20  # less than the page wants to have left
    sign_in_at_the_issuer(page)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    idp.seconds = 300
    asked = len(idp.forms)
    page.goto(f"{service.url}/#/models")
    expect(page.get_by_role("row", name="polite")).to_be_visible()
    assert [form["grant_type"] for form in idp.forms[asked:]] in ([], ["refresh_token"])
    assert idp.forms[-1]["grant_type"] == "refresh_token"


def test_a_sign_in_that_the_issuer_does_not_renew_ends_in_words(page: Page, service: Service, idp: Idp) -> None:
    sign_in_at_the_issuer(page)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    idp.refresh_tokens.clear()
    expire(page)
    expect(page.get_by_text("Your sign-in has ended.")).to_be_visible()
    sign_in_at_the_issuer(page)


def test_trouble_between_the_service_and_the_issuer_ends_no_sign_in(page: Page, idp: Idp) -> None:
    sign_in_at_the_issuer(page)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    idp.secret = "a new secret"
    expire(page)
    expect(page.get_by_role("alert")).to_contain_text("The issuer of the tokens does not answer, or gives no answer")
    idp.secret = SECRET
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_text("Ada Lovelace")).to_be_visible()


@pytest.mark.parametrize("is_renewed", [True, False])
def test_who_signs_out_during_a_renewal_stays_signed_out(page: Page, idp: Idp, is_renewed: bool) -> None:
    sign_in_at_the_issuer(page)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    held: list[Route] = []
    page.route("**/v1/x/sign-in/refresh", lambda route: held.append(route))
    with page.expect_request("**/v1/x/sign-in/refresh"):
        expire(page)
    page.get_by_role("button", name="Sign out").click()
    if not is_renewed:
        idp.refresh_tokens.clear()
        sign_in(page)
        expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    with page.expect_response("**/v1/x/sign-in/refresh") as answered:
        held[0].continue_()
    answered.value.finished()
    page.evaluate("fetch('/healthz').then(() => null)")  # what the page does with the answer comes before this ends
    assert answered.value.ok == is_renewed
    if is_renewed:
        expect(page.get_by_label("API key")).to_be_visible()
    else:
        expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    assert (page.evaluate("sessionStorage.getItem('raydpo session')") is None) == is_renewed


def test_refusals_are_told_in_the_words_of_whoever_refused(page: Page, service: Service, idp: Idp) -> None:
    page.get_by_role("button", name=BUTTON).click()
    page.get_by_role("link", name="Refuse").click()
    expect(page.get_by_role("alert")).to_contain_text("access_denied: Ada said <b>no</b>")
    idp.claims["groups"] = ["<i>guests</i>"]
    page.get_by_role("button", name=BUTTON).click()
    page.get_by_role("link", name="Go on as Ada").click()
    expect(page.get_by_role("alert")).to_contain_text("its claim 'groups' has '<i>guests</i>'")
    page.goto(f"{service.url}/?code=stolen&state=of-another-tab")
    expect(page.get_by_role("alert")).to_contain_text("did not begin in this tab")
    assert "stolen" not in page.url


def test_a_key_serves_beside_an_issuer(page: Page) -> None:
    sign_in(page)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()

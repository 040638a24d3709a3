"""The routes below /v1/x/sign-in, with which the web page signs people in at the OpenID Connect issuer.

These routes need no key, because people who sign in have no key yet.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, StringConstraints
from typing_extensions import TypedDict

from services.control_plane.auth.authentication import Authentication
from services.control_plane.auth.keys import SCOPES
from services.control_plane.core.documents import answers
from services.control_plane.core.errors import NotFound
from services.control_plane.settings import Scope

router = APIRouter(prefix="/x/sign-in")

Word = Annotated[str, StringConstraints(min_length=1, max_length=8192)]


class CodeGrant(BaseModel):
    """The JSON body of POST /v1/x/sign-in/token, which exchanges an authorization code of the OpenID Connect issuer for
    an ID token.
    """

    model_config = ConfigDict(extra="forbid")
    code: Word
    code_verifier: Word
    redirect_uri: Word
    nonce: Word


class RefreshGrant(BaseModel):
    """The JSON body of POST /v1/x/sign-in/refresh, which exchanges a refresh token for a new ID token when the old one
    is about to expire.
    """

    model_config = ConfigDict(extra="forbid")
    refresh_token: Word


class IssuerDocument(TypedDict):
    authorization_endpoint: str
    client_id: str
    scope: str


class SignInDocument(TypedDict):
    """How people can sign in to the web page without an API key. `oidc` says how to reach the OpenID Connect issuer; it
    is null if the operator has set no issuer.
    """

    object: Literal["sign_in"]
    oidc: IssuerDocument | None


class TokenDocument(TypedDict):
    """A token that can be used in place of an API key, with the project and the scopes (permissions) that it has."""

    object: Literal["sign_in.token"]
    token: str
    refresh_token: str | None
    expires_at: int
    name: str
    project_id: str
    scopes: list[Scope]


async def _authentication(request: Request) -> Authentication:
    return cast(Authentication, request.app.state.authentication)


AuthenticationPart = Annotated[Authentication, Depends(_authentication)]


@router.get("", responses=answers(SignInDocument))
async def retrieve(authentication: AuthenticationPart) -> dict[str, Any]:
    """Returns what the web page needs to send a person to the OpenID Connect issuer for signing in: the issuer's
    authorization endpoint, the client id and the OAuth scopes to ask for. `oidc` is null if people sign in with an API
    key.
    """
    flow = authentication.code_flow
    return {"object": "sign_in", "oidc": None if flow is None else await flow.request()}


@router.post("/token", responses=answers(TokenDocument))
async def exchange(authentication: AuthenticationPart, response: Response, body: CodeGrant) -> dict[str, Any]:
    """Exchanges an authorization code of the issuer for an ID token, and checks that this service accepts the token."""
    form = {"grant_type": "authorization_code", **body.model_dump(exclude={"nonce"})}
    return await _tokens(authentication, response, form, body.nonce)


@router.post("/refresh", responses=answers(TokenDocument))
async def refresh(authentication: AuthenticationPart, response: Response, body: RefreshGrant) -> dict[str, Any]:
    """Exchanges a refresh token for a new ID token. The new token has the roles that the person has at the issuer
    now.
    """
    return await _tokens(authentication, response, {"grant_type": "refresh_token", **body.model_dump()}, None)


async def _tokens(
    authentication: Authentication, response: Response, form: Mapping[str, str], nonce: str | None
) -> dict[str, Any]:
    if (flow := authentication.code_flow) is None:
        message = "There is no issuer to sign in at; send an API key, or ask the operator to set oidc_client_id."
        raise NotFound(message, code="sign_in_not_configured")
    await authentication.check_database()  # a code or a refresh token serves once; do not use it up for nothing
    signed_in = await flow.exchange(form, nonce)
    caller = await authentication.caller(signed_in.id_token)
    response.headers["cache-control"] = "no-store"
    return {
        "object": "sign_in.token",
        "token": signed_in.id_token,
        "refresh_token": signed_in.refresh_token,
        "expires_at": signed_in.expires_at,
        "name": signed_in.name,
        "project_id": caller.project_id,
        "scopes": [scope for scope in SCOPES if scope in caller.scopes],
    }

"""Defines an OpenID Connect provider on loopback, with real keys, and the authorization code flow with PKCE."""

import base64
import hashlib
import html
import json
import secrets
import time
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.services.web import Handler, Web

AUDIENCE = "raydpo"
CLIENT, SECRET = "raydpo-page", "a secret: ü?"


class Idp(Web):
    """A provider whose only user, Ada, has the claims in `claims`. Some of its keys are published, others are not.

    `redirect_uris` are those of its client. `secret` is what the client must send to the token endpoint, if anything.
    A code, and a refresh token, serve once. `forms` are the forms that the token endpoint got.
    """

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = IdpHandler
        self.issuer = f"{self.url}/realms/a"
        self.keys: dict[str, Any] = {
            "rsa": rsa.generate_private_key(public_exponent=65537, key_size=2048),
            "ec": ec.generate_private_key(ec.SECP256R1()),
            "hidden": rsa.generate_private_key(public_exponent=65537, key_size=2048),
        }
        about = {"issuer": self.issuer, "jwks_uri": f"{self.url}/keys"}
        about |= {f"{name}_endpoint": f"{self.url}/{name}" for name in ("authorization", "token")}
        self.files["/realms/a/.well-known/openid-configuration"] = json.dumps(about).encode()
        self.publish("rsa", "ec")
        self.redirect_uris: set[str] = set()
        self.secret: str | None = None
        self.claims: dict[str, Any] = {"name": "Ada Lovelace"}
        self.seconds = 300  # how long its ID tokens are valid
        self.codes: dict[str, dict[str, str]] = {}
        self.refresh_tokens: set[str] = set()
        self.forms: list[dict[str, str]] = []

    def publish(self, *names: str) -> None:
        published = []
        for name in names:
            algorithm = jwt.get_algorithm_by_name("ES256" if name == "ec" else "RS256")
            public = algorithm.to_jwk(self.keys[name].public_key(), as_dict=True)
            published.append({**public, "kid": name, "use": "sig"})
        self.files["/keys"] = json.dumps({"keys": published}).encode()

    def token(self, key: str = "rsa", *, alg: str | None = None, kid: str | None = None, **changes: Any) -> str:
        claims = {
            "iss": self.issuer,
            "aud": AUDIENCE,
            "sub": "ada",
            "exp": time.time() + 300,
            "project": "proj_default",
            "scope": "openid read write",
        }
        kept = {name: value for name, value in {**claims, **changes}.items() if value is not None}
        algorithm = alg or ("ES256" if key == "ec" else "RS256")
        secret = "x" * 64 if algorithm == "HS256" else None if algorithm == "none" else self.keys[key]
        return jwt.encode(kept, secret, algorithm=algorithm, headers={"kid": kid or key})

    def id_token(self, **changes: Any) -> str:
        expires_at = time.time() + self.seconds
        return self.token(
            **{"aud": CLIENT, "project": None, "scope": None, "exp": expires_at, **self.claims, **changes}
        )

    # --- the endpoints ------------------------------------------------------------------------------

    def code(self, asked: dict[str, str]) -> str:
        """Returns a code for the authorization request that Ada consented to."""
        assert asked["client_id"] == CLIENT
        assert asked["redirect_uri"] in self.redirect_uris
        assert asked["response_type"] == "code"
        assert asked["code_challenge_method"] == "S256"
        assert len(asked["state"]) >= 22
        assert "openid" in asked["scope"].split()
        self.codes[code := secrets.token_urlsafe()] = asked
        return code

    def answer(self, form: dict[str, str], credentials: str) -> tuple[int, dict[str, Any]]:
        """Returns the status and the body of the token endpoint's answer."""
        self.forms.append(form)
        if form["client_id"] != CLIENT or (self.secret and credentials != f"{quote(CLIENT)}:{quote(self.secret)}"):
            return 401, {"error": "invalid_client"}
        if form["grant_type"] == "refresh_token":
            if form["refresh_token"] not in self.refresh_tokens:
                return 400, {"error": "invalid_grant", "error_description": "The refresh token was used before"}
            self.refresh_tokens.remove(form["refresh_token"])
            return 200, self._tokens(self.id_token())
        asked = self.codes.pop(form["code"], None)
        hashed = hashlib.sha256(form["code_verifier"].encode()).digest()
        challenge = base64.urlsafe_b64encode(hashed).rstrip(b"=").decode()
        if asked is None or asked["code_challenge"] != challenge or asked["redirect_uri"] != form["redirect_uri"]:
            return 400, {"error": "invalid_grant", "error_description": "The code is not valid"}
        return 200, self._tokens(self.id_token(nonce=asked["nonce"]))

    def _tokens(self, id_token: str) -> dict[str, Any]:
        self.refresh_tokens.add(refresh_token := secrets.token_urlsafe())
        told = {"access_token": "opaque", "token_type": "Bearer", "id_token": id_token}
        return told | {"refresh_token": refresh_token}


class IdpHandler(Handler):
    server: Idp

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        if place.path != "/authorization":
            return super().do_GET()
        asked = {name: values[0] for name, values in parse_qs(place.query).items()}
        parts = {"state": asked["state"]}
        yes = f"{asked['redirect_uri']}?{urlencode({'code': self.server.code(asked), **parts})}"
        refused = {"error": "access_denied", "error_description": "Ada said <b>no</b>", **parts}
        no = f"{asked['redirect_uri']}?{urlencode(refused)}"
        page = f"<h1>Provider</h1><a href='{html.escape(yes)}'>Go on as Ada</a> <a href='{html.escape(no)}'>Refuse</a>"
        return self._answer(200, page.encode(), {"Content-Type": "text/html"})

    def do_POST(self) -> None:
        assert self.path == "/token"
        sent = self.rfile.read(int(self.headers["content-length"])).decode()
        form = {name: values[0] for name, values in parse_qs(sent).items()}
        basic = self.headers.get("Authorization", "").removeprefix("Basic ")
        status, body = self.server.answer(form, base64.b64decode(basic).decode())
        self._answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

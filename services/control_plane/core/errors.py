"""Defines the errors of the API, in OpenAI's form: an HTTP status, and a JSON body that always has the
keys `message`, `type`, `param` and `code`.

ApiError
  InvalidRequest 400 · Unauthorized 401 · Forbidden 403 · NotFound 404 · Stalled 408 · Fenced, InFlight 409
  TooLarge 413 · RangeNotSatisfiable 416 · RateLimited, OverQuota 429 · Unavailable, ReplicaDied 503
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from starlette.responses import JSONResponse

from services.contract import storable


def envelope(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Returns the JSON body of an error response, in OpenAI's form.

    `message` describes the error in words. `kind` becomes the error's `type`, such as `invalid_request_error`. `param`
    is the field of the request that the error is about, and `code` a short name of the error; each may be None.
    """
    quoted = storable(message)  # a message may quote text that JSON cannot hold, such as half of a surrogate pair
    return {"error": {"message": quoted, "type": kind, "param": param and storable(param), "code": code}}


class ApiError(Exception):
    """An error with which the API answers a request. OpenAI's client raises an exception with the same `code` and
    `param`."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        return envelope(self.message, self.kind, self.param, self.code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


class InvalidRequest(ApiError):
    """Answers 400: the client made a mistake.

    A conflict with the state of an object is 400 as well and not 409, because OpenAI's clients resend after a 409.
    """

    status, kind = 400, "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message, param=param, code=code)


class Unauthorized(ApiError):
    status, kind = 401, "authentication_error"


class Forbidden(ApiError):
    status, kind = 403, "permission_error"


class NotFound(ApiError):
    status, kind = 404, "invalid_request_error"


class Stalled(ApiError):
    """Answers 408: the client did not send the rest of the request's body in time. The response closes the
    connection."""

    status, kind = 408, "invalid_request_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = {"connection": "close"}


class Fenced(ApiError):
    """Answers 409 to the report of an attempt (one run of a job on Ray) that has ended or was replaced by a newer
    one."""

    status, kind = 409, "invalid_request_error"


class InFlight(ApiError):
    """Answers 409: the same request was sent before and is still being answered. OpenAI's clients then send it
    again."""

    status, kind = 409, "invalid_request_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="idempotency_key_in_flight")
        self.headers = {"retry-after-ms": "250", "x-should-retry": "true"}


class TooLarge(ApiError):
    status, kind = 413, "invalid_request_error"


class RangeNotSatisfiable(ApiError):
    status, kind = 416, "invalid_request_error"

    def __init__(self, message: str, num_bytes: int) -> None:
        super().__init__(message, param="Range")
        self.headers = {"content-range": f"bytes */{num_bytes}"}


class RateLimited(ApiError):
    """Answers 429: the API key sent more requests than its limit allows. The client may send again after `seconds`."""

    status, kind = 429, "rate_limit_error"

    def __init__(self, message: str, *, seconds: float, headers: Mapping[str, str]) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        wait = {"retry-after-ms": str(math.ceil(seconds * 1000)), "retry-after": str(math.ceil(seconds))}
        self.headers = {**headers, **wait}


class OverQuota(ApiError):
    """Answers 429: the project has reached one of its limits. Sending the request again does not help."""

    status, kind = 429, "insufficient_quota"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="exceeded_quota")
        self.headers = {"x-should-retry": "false"}


class Unavailable(ApiError):
    """Answers 503: the service cannot answer now. The client may send again after `retry_after` seconds."""

    status, kind = 503, "server_error"

    def __init__(self, message: str, *, retry_after: int, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.headers = {"retry-after": str(retry_after)}


class ReplicaDied(Unavailable):
    """Answers 503: a model's replica or its engine died while it answered, perhaps because of the request."""

"""What OpenAI's own client makes of the errors of the API: the exception, its code, and whether to send again."""

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from services.control_plane.core import errors
from services.control_plane.core.errors import ApiError

ERRORS = [
    (errors.InvalidRequest("no", param="model"), openai.BadRequestError, "invalid_value"),
    (errors.Unauthorized("no", code="invalid_api_key"), openai.AuthenticationError, "invalid_api_key"),
    (errors.Forbidden("no", code="missing_scope"), openai.PermissionDeniedError, "missing_scope"),
    (errors.NotFound("no", code="file_not_found"), openai.NotFoundError, "file_not_found"),
    (errors.Fenced("no"), openai.ConflictError, None),
    (errors.InFlight("no"), openai.ConflictError, "idempotency_key_in_flight"),
    (errors.RateLimited("no", seconds=1.5, headers={}), openai.RateLimitError, "rate_limit_exceeded"),
    (errors.OverQuota("no", param="file"), openai.RateLimitError, "exceeded_quota"),
    (errors.Unavailable("no", retry_after=3, code="overloaded"), openai.InternalServerError, "overloaded"),
    (ApiError("no", code="model_error"), openai.InternalServerError, "model_error"),
]


def asked(error: ApiError, retries: int = 0) -> tuple[openai.APIStatusError, int]:
    """Returns the exception of a client to which each request is answered with the error, and the number of sends."""
    sends = []

    def answer(request: httpx.Request) -> httpx.Response:
        sends.append(request)
        response = error.response()
        return httpx.Response(response.status_code, headers=response.headers, content=bytes(response.body))

    http = httpx.Client(transport=httpx.MockTransport(answer))
    client = openai.OpenAI(api_key="k", base_url="http://nowhere/v1", http_client=http, max_retries=retries)
    with pytest.raises(openai.APIStatusError) as raised:
        client.models.list()
    return raised.value, len(sends)


@pytest.mark.parametrize(("error", "kind", "code"), ERRORS)
def test_the_client_raises_the_kind_of_error_with_its_code_and_field(error: ApiError, kind: Any, code: Any) -> None:
    raised, _ = asked(error)
    assert type(raised) is kind
    assert (raised.code, raised.param, raised.type) == (code, error.param, error.kind)
    assert raised.body == {"message": "no", "type": error.kind, "param": error.param, "code": code}


@pytest.mark.parametrize(
    ("make", "sends"),
    [
        (lambda: errors.InFlight("no"), 2),
        (lambda: errors.RateLimited("no", seconds=0.001, headers={}), 2),
        (lambda: errors.OverQuota("no"), 1),
        (lambda: errors.InvalidRequest("no"), 1),
    ],
)
def test_the_client_sends_again_only_where_that_may_help(make: Callable[[], ApiError], sends: int) -> None:
    assert asked(make(), retries=1)[1] == sends


def test_waits_are_told_in_whole_milliseconds_and_seconds_rounded_up() -> None:
    limited = errors.RateLimited("no", seconds=1.2341, headers={"x-ratelimit-limit-requests": "5"})
    assert limited.headers == {"x-ratelimit-limit-requests": "5", "retry-after-ms": "1235", "retry-after": "2"}
    assert errors.Unavailable("no", retry_after=7).headers == {"retry-after": "7"}


def test_a_range_behind_the_end_names_the_size_and_a_stalled_body_closes_the_connection() -> None:
    assert errors.RangeNotSatisfiable("no", 12).headers == {"content-range": "bytes */12"}
    assert errors.Stalled("no").headers == {"connection": "close"}


def test_a_message_may_quote_half_of_a_surrogate_pair() -> None:
    assert errors.InvalidRequest("it is \ud83d", param="\udc00").response().status_code == 400

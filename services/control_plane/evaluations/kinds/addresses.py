"""Asks judges at addresses that the operator set: models behind an OpenAI-compatible API outside of this service.

No engine of this service is loaded for such a judge.
"""

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

import httpx

from services.control_plane.core.errors import ApiError, InvalidRequest, Unavailable
from services.control_plane.inference.inference import ANSWER_SECONDS, RETRY_AFTER_SECONDS
from services.control_plane.settings import JudgeAddress

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
MOST_RETRIES, LONGEST_WAIT_SECONDS = 4, 20.0  # of a request that the address answers with 429, and before each retry
MOST_CONNECTIONS = 32  # of one control plane, to all addresses together; further requests wait
REFUSES_THE_KEY, REFUSES_THE_QUESTION = (401, 403), (400, 413, 422)  # statuses of answers


@dataclass(frozen=True)
class Address:
    """A judge at an address. `id` is the judge's name: its key in the setting `judges`, whose value is `place`."""

    id: str
    place: JudgeAddress


def client() -> httpx.AsyncClient:
    """Returns an HTTP client for asking judges at addresses. It follows no redirects, which could lead the API key
    elsewhere.
    """
    timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, pool=None)
    return httpx.AsyncClient(timeout=timeout, limits=httpx.Limits(max_connections=MOST_CONNECTIONS))


async def ask(http: httpx.AsyncClient, judge: Address, question: str) -> bytes:
    """Sends the question to the judge, at temperature 0, and returns the body of the answer, which should have the form
    of OpenAI's API.

    The request has only fields that every such API knows. Raises InvalidRequest if the judge refuses the question,
    Unavailable if the judge cannot be asked now, for example because the address refuses the API key, and another
    ApiError if the judge fails.
    """
    place = judge.place
    body = {"model": place.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    headers = {"content-type": "application/json"}
    if place.api_key is not None:
        headers["authorization"] = f"Bearer {place.api_key.get_secret_value()}"
    try:
        answer = await _post(http, f"{place.url}/chat/completions", json.dumps(body).encode(), headers)
    except httpx.HTTPError as error:
        raise _unavailable(judge, f"did not answer ({type(error).__name__})", str(error)) from None
    if answer.status_code != HTTPStatus.OK:
        raise _refusal(judge, answer)
    return answer.content


async def _post(http: httpx.AsyncClient, url: str, body: bytes, headers: Mapping[str, str]) -> httpx.Response:
    """Sends the request, and sends it again after answers with the status 429, at most MOST_RETRIES times.

    Waits as long as `retry-after` says. Returns the answer 429 at once if that is more than LONGEST_WAIT_SECONDS.
    """
    for number in range(MOST_RETRIES + 1):
        answer = await http.post(url, content=body, headers=headers)
        try:
            seconds = float(answer.headers.get("retry-after", ""))
        except ValueError:  # it is missing, or a date
            seconds = 2.0**number
        is_late = number == MOST_RETRIES or not seconds <= LONGEST_WAIT_SECONDS
        if answer.status_code != HTTPStatus.TOO_MANY_REQUESTS or is_late:
            break
        await asyncio.sleep(seconds)
    return answer


def _refusal(judge: Address, answer: httpx.Response) -> ApiError:
    status, said = answer.status_code, _said(judge, answer)
    if status in REFUSES_THE_KEY:  # the answer may quote a part of the key
        return _unavailable(judge, f"refuses the API key of the service (status {status}); ask the operator", "")
    if status in REFUSES_THE_QUESTION:
        return InvalidRequest(f"The judge '{judge.id}' refused the question: {said}", param="judge.model")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.SERVICE_UNAVAILABLE:
        return ApiError(f"The judge '{judge.id}' failed with the status {status}: {said}", code="model_error")
    return _unavailable(judge, f"cannot be asked now: its address answers with the status {status}", said)


def _said(judge: Address, answer: httpx.Response) -> str:
    """Returns the message of an answer with an error status, without the API key, which some servers quote."""
    try:
        said = str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        said = answer.text
    key = judge.place.api_key
    return (said.replace(key.get_secret_value(), "***") if key else said)[:500] or "no reason given"


def _unavailable(judge: Address, trouble: str, details: str) -> Unavailable:
    """Returns the error for a judge that cannot be asked now. Logs `details` for the operator, because they may name
    what users must not see, such as the operator's account.
    """
    log.warning("The judge %s at %s %s: %s", judge.id, judge.place.url, trouble, details or "no details")
    message = f"The judge '{judge.id}' {trouble}. Try again in {RETRY_AFTER_SECONDS} seconds."
    return Unavailable(message, retry_after=RETRY_AFTER_SECONDS, code="model_unavailable")

"""Tests the limit of requests per minute of a key."""

import httpx
import pytest

from services.control_plane.core.errors import RateLimited
from services.control_plane.http.limits.rate_limit import RateLimits
from tests.services.control_plane.conftest import api_of, new_key


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def left(headers: dict[str, str]) -> tuple[str, str]:
    return headers["x-ratelimit-remaining-requests"], headers["x-ratelimit-reset-requests"]


def test_a_minute_s_requests_may_come_at_once_and_then_one_by_one() -> None:
    clock = Clock()
    rates = RateLimits(now=clock)
    assert [left(rates.take("a", 3)) for _ in range(3)] == [("2", "20s"), ("1", "40s"), ("0", "1m0s")]
    for _ in range(2):  # a refusal costs nothing
        with pytest.raises(RateLimited, match=r"3 requests per minute for the key a. Try again in 20s") as refused:
            rates.take("a", 3)
        assert (refused.value.headers["retry-after"], refused.value.headers["retry-after-ms"]) == ("20", "20000")
    assert left(rates.take("b", 3)) == ("2", "20s")
    clock.now += 20
    assert left(rates.take("a", 3)) == ("0", "1m0s")
    clock.now += 60
    assert left(rates.take("a", 3)) == ("2", "20s")


def test_no_minute_has_more_than_twice_the_limit_and_the_long_run_has_the_limit() -> None:
    clock, taken = Clock(), 0
    rates = RateLimits(now=clock)
    for _ in range(6000):
        clock.now += 0.1
        try:
            rates.take("a", 60)
            taken += 1
        except RateLimited:
            pass
    assert taken == 60 + 600 - 1


def test_lengths_of_time_are_written_as_openai_does() -> None:
    clock = Clock()
    assert left(RateLimits(now=clock).take("a", 5000)) == ("4999", "12ms")
    assert left(RateLimits(now=clock).take("a", 60)) == ("59", "1s")


def test_a_key_over_its_rate_is_told_when_to_come_back(api: httpx.Client, base_url: str) -> None:
    with api_of(base_url, new_key(api, requests_per_minute=2)["value"]) as own:
        first, second, third = (own.get("/files") for _ in range(3))
    assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "1")
    assert (second.status_code, second.headers["x-ratelimit-limit-requests"]) == (200, "2")
    assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert third.json()["error"]["type"] == "rate_limit_error"
    assert 0 < int(third.headers["retry-after"]) <= 30
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-ratelimit-limit-requests" not in api.get("/files").headers


def test_tokens_count_when_they_were_used_and_a_debt_is_waited_out() -> None:
    clock = Clock()
    tokens = RateLimits("tokens", now=clock)
    assert tokens.look("a", 600)["x-ratelimit-remaining-tokens"] == "600"
    tokens.count("a", 600, 100)
    told = tokens.look("a", 600)
    assert (told["x-ratelimit-limit-tokens"], told["x-ratelimit-remaining-tokens"]) == ("600", "500")
    assert told["x-ratelimit-reset-tokens"] == "10s"
    tokens.count("a", 600, 3000)  # an answer may go beyond
    with pytest.raises(RateLimited, match=r"600 tokens per minute for the key a. Try again in 4m10s") as refused:
        tokens.look("a", 600)
    assert refused.value.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 249
    with pytest.raises(RateLimited):
        tokens.look("a", 600)
    clock.now += 1
    assert tokens.look("a", 600)["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 60
    assert tokens.look("a", 600)["x-ratelimit-remaining-tokens"] == "600"

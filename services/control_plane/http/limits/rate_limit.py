"""Limits how many requests and tokens each API key may use per minute, and how many of its requests may run at the same
time.

Each control plane counts only its own requests.

A key may use the amount of a whole minute at once. After that, it may use one further unit (a request or a token) every
1/limit of a minute. For each key, the process stores one number: the time from which the key may use the amount of a
whole minute again (the generic cell rate algorithm). A library for this would store the same number, but start a thread
with a timer.

The number of a request's tokens is known only at its end. A request is therefore admitted while the key has tokens
left, and the request's tokens are counted when the request has ended. A key that exceeded its limit must wait until the
excess tokens would have been allowed.
"""

import math
import time
from collections import Counter
from collections.abc import Callable

from cachetools import TLRUCache

from services.control_plane.core.errors import RateLimited

MINUTE = 60.0
MAX_KEYS = 100_000
AT_ONCE_SECONDS = 1.0  # after which a client with too many requests in flight may try again


class RateLimits:
    """Counts the requests or the tokens of every API key, and refuses requests beyond the limit of a key.

    `what` says what is counted: requests or tokens.
    """

    def __init__(self, what: str = "requests", *, now: Callable[[], float] = time.monotonic) -> None:
        self._what, self._now = what, now
        # The cache drops a key as soon as the key may use the amount of a whole minute again.
        self._full_at: TLRUCache[str, float] = TLRUCache(MAX_KEYS, lambda _, full_at, now: full_at, timer=now)

    def take(self, key_id: str, limit: int) -> dict[str, str]:
        """Counts one unit (a request or a token) for a key whose limit is `limit` per minute. Returns the x-ratelimit
        headers of the response.

        Raises RateLimited if the key has reached its limit.
        """
        self._admit(key_id, limit, 1)
        self.count(key_id, limit, 1)
        return self._headers(key_id, limit)

    def look(self, key_id: str, limit: int) -> dict[str, str]:
        """Returns the x-ratelimit headers for a response to a request with this key, without counting the request or
        its tokens.

        Raises RateLimited if the key has reached its limit, which is `limit` per minute.
        """
        self._admit(key_id, limit, 0)
        return self._headers(key_id, limit)

    def count(self, key_id: str, limit: int, amount: int) -> None:
        """Counts `amount` units (requests or tokens) that a key has used, even beyond its limit of `limit` per
        minute."""
        now = self._now()
        self._full_at[key_id] = max(now, self._full_at.get(key_id, now)) + amount * MINUTE / limit

    def _admit(self, key_id: str, limit: int, amount: int) -> None:
        now = self._now()
        wait = max(now, self._full_at.get(key_id, now)) + amount * MINUTE / limit - MINUTE - now
        if wait > 1e-6:  # no request is refused for a rounding error
            message = f"Rate limit reached: {limit} {self._what} per minute for the key {key_id}"
            headers = self._headers(key_id, limit)
            raise RateLimited(f"{message}. Try again in {_duration(wait)}.", seconds=wait, headers=headers)

    def _headers(self, key_id: str, limit: int) -> dict[str, str]:
        now = self._now()
        reset = max(0.0, self._full_at.get(key_id, now) - now)
        return {
            f"x-ratelimit-limit-{self._what}": str(limit),
            f"x-ratelimit-remaining-{self._what}": str(max(0, math.floor((MINUTE - reset) * limit / MINUTE + 1e-6))),
            f"x-ratelimit-reset-{self._what}": _duration(reset),
        }


class InFlight:
    """Counts the requests of each API key that are being answered now, and refuses a request of a key that has reached
    its limit.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def enter(self, key_id: str, limit: int) -> dict[str, str]:
        """Counts a request as in flight until `leave` is called. Returns the x-ratelimit headers of the response.

        Raises RateLimited if `limit` requests of the key are in flight.
        """
        count = self._counts[key_id]
        if count >= limit:
            message = f"Rate limit reached: {count} requests of the key {key_id} are being answered, which is the limit"
            message += ". Send this request again when one of them has ended."
            raise RateLimited(message, seconds=AT_ONCE_SECONDS, headers=self._headers(limit, 0))
        self._counts[key_id] += 1
        return self._headers(limit, limit - count - 1)

    def leave(self, key_id: str) -> None:
        self._counts[key_id] -= 1
        self._counts += Counter()  # drops keys that have none in flight

    def _headers(self, limit: int, left: int) -> dict[str, str]:
        return {"x-ratelimit-limit-at-once": str(limit), "x-ratelimit-remaining-at-once": str(left)}


def _duration(seconds: float) -> str:
    """Returns a number of seconds as a text in OpenAI's form: `12ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{max(1, math.ceil(seconds * 1000))}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"

"""Limits the requests per minute of each API key. Every replica counts only its own requests.

A key may send a minute's requests at once; then one more request is allowed every 1/limit of a minute. For each key,
the process stores one number: the time at which all requests of a minute are allowed again (the generic cell rate
algorithm). A library's counter would start a thread with a timer for the same number.
"""

import math
import time
from collections.abc import Callable

from cachetools import TTLCache

from services.control_plane.core.errors import RateLimited

MINUTE = 60.0
MAX_KEYS = 100_000


class RateLimits:
    """Counts the requests of every API key, and refuses requests beyond a key's limit."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        # A key that sent nothing for a minute may send a minute's requests again, and need not be kept.
        self._full_at: TTLCache[str, float] = TTLCache(MAX_KEYS, MINUTE, timer=now)

    def take(self, key_id: str, limit: int) -> dict[str, str]:
        """Counts a request of a key that may send `limit` a minute. Returns the x-ratelimit headers of the response.

        Raises RateLimited if the key has sent too many requests.
        """
        now, each = self._now(), MINUTE / limit
        full_at = max(now, self._full_at.get(key_id, now)) + each
        wait = full_at - MINUTE - now
        if wait > 1e-6:  # no request is refused for a rounding error
            headers = _headers(limit, 0, full_at - each - now)
            message = (
                f"Rate limit reached: {limit} requests per minute for the key {key_id}. Try again in {_duration(wait)}."
            )
            raise RateLimited(message, seconds=wait, headers=headers)
        self._full_at[key_id] = full_at
        return _headers(limit, math.floor((now + MINUTE - full_at) / each + 1e-6), full_at - now)


def _headers(limit: int, remaining: int, reset: float) -> dict[str, str]:
    prefix = "x-ratelimit-"
    return {
        f"{prefix}limit-requests": str(limit),
        f"{prefix}remaining-requests": str(remaining),
        f"{prefix}reset-requests": _duration(reset),
    }


def _duration(seconds: float) -> str:
    """Returns a duration in OpenAI's form: `12ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{max(1, math.ceil(seconds * 1000))}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"

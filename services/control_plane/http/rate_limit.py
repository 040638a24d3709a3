"""Requests per minute of a key, in this process: with several replicas each allows as many.

A bucket that refills steadily: a minute's requests at once, then one for every 1/limit of a minute. All that is kept of
a key is when its bucket will be full again (the generic cell rate algorithm). A library's counter would start a
timer's thread for the same number.
"""

import math
import time
from collections.abc import Callable

from cachetools import TTLCache

from services.control_plane.core.errors import RateLimited

MINUTE = 60.0
MAX_KEYS = 100_000


class RateLimits:
    """The buckets of all keys."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        # A key that sent nothing for a minute has a full bucket, and may be forgotten.
        self._full_at: TTLCache[str, float] = TTLCache(MAX_KEYS, MINUTE, timer=now)

    def take(self, key_id: str, limit: int) -> dict[str, str]:
        """Count one request against `limit` a minute. The headers that tell what is left; raises RateLimited."""
        now, each = self._now(), MINUTE / limit
        full_at = max(now, self._full_at.get(key_id, now)) + each
        wait = full_at - MINUTE - now
        if wait > 1e-6:  # a rounding error refuses nobody
            headers = _headers(limit, 0, full_at - each - now)
            message = f"Rate limit reached: {limit} requests per minute for {key_id}. Try again in {_duration(wait)}."
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
    """As OpenAI writes it: `12ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{max(1, math.ceil(seconds * 1000))}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"

"""Limits the requests per minute of each key, in this process. Several replicas count for themselves.

A key may send a minute's requests at once; then one more comes back every 1/limit of a minute. Per key, the process
keeps one number: when all will have come back (the generic cell rate algorithm). A library's counter would start a
thread with a timer for the same number.
"""

import math
import time
from collections.abc import Callable

from cachetools import TTLCache

from services.control_plane.core.errors import RateLimited

MINUTE = 60.0
MAX_KEYS = 100_000


class RateLimits:
    """What each key may still send."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        # A key that sent nothing for a minute may send all again, and need not be kept.
        self._full_at: TTLCache[str, float] = TTLCache(MAX_KEYS, MINUTE, timer=now)

    def take(self, key_id: str, limit: int) -> dict[str, str]:
        """Counts a request of a key that has `limit` a minute. Returns headers on what is left. Raises RateLimited."""
        now, each = self._now(), MINUTE / limit
        full_at = max(now, self._full_at.get(key_id, now)) + each
        wait = full_at - MINUTE - now
        if wait > 1e-6:  # no request is refused for a rounding error
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
    """Writes a duration as OpenAI does: `12ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{max(1, math.ceil(seconds * 1000))}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"

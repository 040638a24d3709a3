"""Measures the load of a vLLM engine, from the statistics that vLLM records after each step."""

import time
from collections import deque
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

WINDOW_SECONDS = 60.0


class Load(AggregateStatLoggerBase):  # type: ignore[misc]
    """Counts the requests that are in a vLLM engine now, and what the engine did in the last WINDOW_SECONDS seconds.

    In this period it counts the generated tokens and the requests that got their first token, and adds up how long
    these requests had waited for it.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._running = self._waiting = 0
        self._steps: deque[tuple[float, int, list[float]]] = deque()  # time, tokens, seconds to each first token

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self._running, self._waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
        if iteration_stats is not None and iteration_stats.num_generation_tokens:
            first = list(iteration_stats.time_to_first_tokens_iter)
            self._steps.append((time.monotonic(), iteration_stats.num_generation_tokens, first))
            self._forget()

    def log_engine_initialized(self) -> None:
        pass

    def _forget(self) -> None:
        while self._steps and self._steps[0][0] < time.monotonic() - WINDOW_SECONDS:
            self._steps.popleft()

    def as_json(self) -> dict[str, float]:
        """Returns the counts of requests and tokens by name. The key `seconds` holds the length of the period that they
        cover.

        The key `first_token_seconds` holds the sum of the times that requests waited for their first token. This value
        is a sum and not a mean, so that the values of several replicas can be added.
        """
        self._forget()
        first = [seconds for _, _, step in self._steps for seconds in step]
        return {
            "requests_running": self._running,
            "requests_waiting": self._waiting,
            "seconds": min(WINDOW_SECONDS, time.monotonic() - self._began),
            "tokens": sum(tokens for _, tokens, _ in self._steps),
            "first_tokens": len(first),
            "first_token_seconds": sum(first),
        }

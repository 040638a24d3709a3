"""Tests the load of an engine, from statistics as vLLM records them."""

import time

import pytest
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from services.serving.load import WINDOW_SECONDS, Load

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # in vLLM's own imports


def step(tokens: int, *first: float) -> IterationStats:
    stats = IterationStats()
    stats.num_generation_tokens = tokens
    stats.time_to_first_tokens_iter = list(first)
    return stats


def test_tokens_and_waits_are_summed_and_requests_are_those_of_the_last_step() -> None:
    load = Load()
    load.record(SchedulerStats(num_running_reqs=2, num_waiting_reqs=1), step(3, 0.5, 0.25))
    load.record(SchedulerStats(num_running_reqs=1, num_waiting_reqs=0), step(4))
    load.record(None, None)
    told = load.as_json()
    assert 0 <= told.pop("seconds") < WINDOW_SECONDS
    assert told == {
        "requests_running": 1,
        "requests_waiting": 0,
        "tokens": 7,
        "first_tokens": 2,
        "first_token_seconds": 0.75,
    }


def test_what_is_older_than_the_window_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    load, now = Load(), time.monotonic()
    load.record(None, step(3, 0.5))
    monkeypatch.setattr(time, "monotonic", lambda: now + WINDOW_SECONDS / 2)
    load.record(None, step(4, 0.25))
    monkeypatch.setattr(time, "monotonic", lambda: now + WINDOW_SECONDS + 1)
    told = load.as_json()
    assert (told["tokens"], told["first_tokens"], told["seconds"]) == (4, 1, WINDOW_SECONDS)

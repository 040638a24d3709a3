from typing import Any

import pytest

from services.control_plane.attempts.decision import (
    PAUSE_SECONDS,
    Decision,
    Past,
    Stopwatches,
    decide,
    pause_seconds,
    rest_seconds,
)
from services.control_plane.core.tables import Attempt, Job

PAST = Past(slot=True, failures=0, limit=3)


def job(desired: str = "run", observed: str = "running", **fields: Any) -> Job:
    return Job(id="ftjob-1", desired=desired, observed=observed, **fields)


def attempt(state: str = "running", outcome: str | None = None) -> Attempt:
    return Attempt(job_id="ftjob-1", number=1, state=state, outcome={"kind": outcome} if outcome else None)


@pytest.mark.parametrize("desired", ["run", "pause", "cancel"])
@pytest.mark.parametrize("status", ["pending", "running", "ended", "absent", "unknown"])
def test_a_told_outcome_is_final_whatever_is_wished_and_whatever_ray_says(desired: str, status: Any) -> None:
    for outcome, decision in {"succeeded": Decision.FINISH, "failed": Decision.FINISH, "paused": Decision.REST}.items():
        assert decide(job(desired), attempt(outcome=outcome), status, PAST, collected=False) is decision


@pytest.mark.parametrize("desired", ["run", "pause", "cancel"])
def test_without_rays_word_nothing_is_done(desired: str) -> None:
    past = Past(slot=True, failures=0, limit=3, hung=True, overdue=True)
    assert decide(job(desired), attempt(), "unknown", past, collected=True) is Decision.WAIT


def test_a_launch_that_never_arrived_is_repeated_only_if_the_job_shall_run() -> None:
    for desired, decision in {"run": Decision.LAUNCH, "pause": Decision.LOSE, "cancel": Decision.LOSE}.items():
        assert decide(job(desired), attempt("launching"), "absent", PAST, collected=True) is decision


def test_without_an_attempt_the_wish_decides() -> None:
    assert decide(job("pause"), None, "unknown", PAST, collected=False) is Decision.PAUSE
    assert decide(job("pause", "paused"), None, "unknown", PAST, collected=False) is Decision.WAIT
    assert decide(job("cancel"), None, "unknown", PAST, collected=False) is Decision.CANCEL
    assert decide(job("run"), None, "unknown", PAST, collected=False) is Decision.OPEN


def test_after_a_failure_a_running_job_rests_and_one_in_the_queue_does_not() -> None:
    assert [rest_seconds(failures) for failures in range(7)] == [0, 5, 25, 125, 625, 3125, 3600]

    def next_for(observed: str, failures: int, rested: float) -> Decision:
        past = Past(slot=True, failures=failures, limit=4, rested_seconds=rested)
        return decide(job("run", observed), None, "unknown", past, collected=False)

    assert next_for("running", 2, 24.9) is Decision.WAIT
    assert next_for("running", 2, 25) is Decision.OPEN
    assert next_for("queued", 2, 1) is Decision.OPEN
    assert next_for("running", 4, 0) is Decision.GIVE_UP


def test_a_wish_is_not_kept_waiting_by_a_rest() -> None:
    past = Past(slot=True, failures=2, limit=4, rested_seconds=1)
    assert decide(job("cancel"), None, "unknown", past, collected=False) is Decision.CANCEL
    assert decide(job("pause"), None, "unknown", past, collected=False) is Decision.PAUSE


def test_where_steps_are_long_a_pause_may_take_longer() -> None:
    assert pause_seconds(job()) == PAUSE_SECONDS
    progress = {"stage": "training", "since": 1000.0, "start": 4, "done": 4, "total": 9, "at": 1000.0}
    assert pause_seconds(job(progress=progress)) == PAUSE_SECONDS
    assert pause_seconds(job(progress=progress | {"done": 6, "at": 2000.0})) == PAUSE_SECONDS + 1500
    encoding = progress | {"stage": "encoding", "done": 6, "at": 2000.0}
    assert pause_seconds(job(progress=encoding)) == PAUSE_SECONDS


def test_a_stopwatch_counts_while_it_holds_and_somebody_looks() -> None:
    now = 0.0
    watches = Stopwatches(gap_seconds=10, clock=lambda: now)

    def look(at: float, holds: bool | None) -> float:
        nonlocal now
        now = at
        watches.look()
        return watches.seconds("it runs", holds)

    assert [look(at, True) for at in (100, 105, 114)] == [0, 5, 14]
    assert look(120, None) == 20, "not known: it goes on"
    assert look(121, False) == 0
    assert look(122, None) == 0, "not known: it does not begin"
    assert [look(at, True) for at in (123, 130)] == [0, 7]
    assert [look(at, True) for at in (141, 143)] == [0, 2], "nobody looked for eleven seconds"
    watches.look()
    watches.look()
    assert watches.seconds("it runs", True) == 0, "nobody asked for it"

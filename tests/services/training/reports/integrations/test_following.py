"""Tests the follower, which copies metrics to a sink, with sinks that work, raise, hang, or cannot be imported."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from services import storage
from services.contract import AttemptSpec, Message, Report, Started
from services.spool import segment_uri
from services.training.reports.integrations import following
from services.training.reports.integrations.following import Follower
from services.training.reports.integrations.sink import Status, Step
from tests.services.training.spool import STARTED_AT, Spool, until


class Place:
    """Holds the state of a run outside of the sinks that write to it, so that it outlives them."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.steps: list[Step] = []
        self.failures: list[Exception] = []  # of the next calls
        self.hang = threading.Event()
        self.hang.set()

    def called(self, call: Any) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.hang.wait()
        self.calls.append(call)


class PlaceSink:
    where = "there"

    def __init__(self, place: Place) -> None:
        self.place = place
        self.last_step = place.steps[-1].number if place.steps else 0
        place.called("open")

    def begin(self, started: Started) -> None:
        self.place.called(("begin", started.resumed_from))

    def write(self, steps: Sequence[Step]) -> None:
        self.place.called(("write", len(steps)))
        self.place.steps += steps

    def close(self, status: Status | None) -> None:
        self.place.called(("close", status))


@pytest.fixture
def place() -> Place:
    return Place()


@pytest.fixture
def follow(spec: AttemptSpec, place: Place) -> Callable[[], tuple[Follower, list[Report]]]:
    def follow() -> tuple[Follower, list[Report]]:
        told: list[Report] = []
        return Follower("Place", lambda spec, folder: PlaceSink(place), spec, told.append), told

    return follow


def numbers(place: Place) -> list[int]:
    return [step.number for step in place.steps]


def test_all_attempts_are_told_each_step_once_and_the_end_last(follow: Any, place: Place, spool: Spool) -> None:
    spool.add_steps(1, 5)
    spool.add_steps(5, 7, attempt=2)
    follower, told = follow()
    until(lambda: numbers(place) == [1, 2, 3, 4, 5, 6, 7])
    spool.add_steps(8, 9, attempt=2)
    follower.close("succeeded", 10)
    assert numbers(place) == list(range(1, 10))
    assert place.steps[2] == Step(
        3, STARTED_AT + 3, {"train/loss": 1 / 3, "train/rewards/margins": 3 / 8, "eval/loss": 2 / 3}
    )
    assert place.calls == ["open", ("begin", 0), ("write", 7), ("write", 2), ("close", "succeeded")]
    assert told == [Message(message="Place: there")]


def test_a_sink_that_has_steps_is_told_the_later_ones(follow: Any, place: Place, spool: Spool) -> None:
    place.steps = [Step(number, 0.0, {}) for number in (1, 2, 3, 4)]
    spool.add_steps(1, 6)
    follower, _ = follow()
    follower.close("failed", 10)
    assert numbers(place) == [1, 2, 3, 4, 5, 6]


def test_steps_whose_bits_flipped_are_left_out(follow: Any, place: Place, spool: Spool, spec: AttemptSpec) -> None:
    spool.add_steps(1, 9)
    segment = storage.fetch(segment_uri(spec.run_uri, 1, 4))
    segment.write_bytes(segment.read_bytes().replace(b'"loss":0.2', b'"loss":0.3'))
    follower, told = follow()
    follower.close("succeeded", 10)
    assert numbers(place) == [1, 2, 3, 8, 9]
    assert told == [Message(message="Place: there")]


def test_steps_are_written_in_bounded_parts(
    follow: Any, place: Place, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "STEPS_PER_WRITE", 3)
    spool.add_steps(1, 9)
    follower, _ = follow()
    follower.close(None, 10)
    assert [call for call in place.calls if call[0] == "write"] == [("write", 3), ("write", 4), ("write", 2)]


@pytest.mark.parametrize("num_calls_before", [0, 1, 2])
def test_a_sink_that_raises_is_told_of_once_and_tried_until_it_has_all(
    follow: Any,
    place: Place,
    spool: Spool,
    num_calls_before: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    failures: list[Any] = [None] * num_calls_before
    errors = [OSError("no\nroute to http://user:canary@host"), RuntimeError("canary"), OSError("3")]
    place.called = lambda call, record=place.called: _raise(failures, errors) or record(call)  # type: ignore[method-assign]
    spool.add_steps(1, 9)
    follower, told = follow()
    until(lambda: numbers(place) == list(range(1, 10)))
    follower.close("succeeded", 10)
    assert numbers(place) == list(range(1, 10))
    assert place.calls[-1] == ("close", "succeeded")
    (warning,) = [report for report in told if report.level == "warn"]
    assert warning.message == (
        "Place: no route to http://host; sending is tried again every 0 s. The training itself continues."
    )
    assert "canary" not in caplog.text


def _raise(passes: list[Any], errors: list[Exception]) -> None:
    if passes:
        passes.pop()
    elif errors:
        raise errors.pop(0)


def test_a_sink_that_hangs_is_told_of_once_and_left_behind(
    follow: Any, place: Place, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "SLOW_SECONDS", 0.2)
    place.hang.clear()
    spool.add_steps(1, 9)
    follower, told = follow()
    until(lambda: told)
    assert told == [
        Message(
            level="warn", message=("Place: the integration has not answered for 0 s. The training itself continues.")
        )
    ]
    follower.close("succeeded", 0.3)  # returns although the integration still hangs
    assert len(told) == 1
    place.hang.set()


def test_what_a_sink_could_not_take_in_time_is_told(follow: Any, place: Place, spool: Spool) -> None:
    spool.add_steps(1, 3)
    follower, told = follow()
    until(lambda: place.steps)
    place.hang.clear()
    spool.add_steps(4, 5)
    follower.close("succeeded", 0.3)
    assert "the metrics of the last steps could not be sent within 0 s" in told[-1].message
    place.hang.set()


def test_a_sink_that_still_fails_at_the_end_is_given_up(follow: Any, place: Place, spool: Spool) -> None:
    place.failures = [OSError("down")] * 1000
    spool.add_steps(1, 3)
    follower, told = follow()
    until(lambda: told)
    follower.close("succeeded", 10**6)  # returns long before that
    assert len(told) == 1


def test_a_package_that_the_cluster_lacks_is_named(spec: AttemptSpec) -> None:
    def open_sink(spec: AttemptSpec, folder: Path) -> Any:
        import a_package_that_is_not_there  # type: ignore[import-not-found]

        return a_package_that_is_not_there

    told: list[Any] = []
    Follower("Place", open_sink, spec, told.append).close(None, 10)
    assert [report.message for report in told] == [
        "Place: the Ray cluster lacks the Python package a_package_that_is_not_there; the operator must build its "
        "image with raydpo[cluster]. The training itself continues."
    ]

import errno
from collections.abc import Callable

import pytest
from ray.exceptions import RayTaskError

from services import storage
from services.contract import Message
from services.training.run import unavailable_storage
from services.training.run.unavailable_storage import retry_while_unavailable
from tests.services.s3 import S3

FULL = OSError(errno.ENOSPC, "No space left on device")
AWAY = OSError(
    "When uploading key 'a' in bucket 'b': AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7"
)
REFUSED = OSError(
    "When uploading key 'a' in bucket 'b': AWS Error ACCESS_DENIED during PutObject operation: Access Denied"
)


def failing(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def write() -> str:
        if left:
            raise left.pop(0)
        return "written"

    return write


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unavailable_storage, "FIRST_PAUSE_SECONDS", 0.01)


def test_what_finds_no_room_is_told_once_and_written_when_there_is_some() -> None:
    told: list[Message] = []
    in_a_task = RayTaskError("write", "its traceback", FULL).as_instanceof_cause()
    assert retry_while_unavailable(failing(FULL, in_a_task, FULL), "exporting the policy", told.append) == "written"
    sentence = (
        "The storage is full; exporting the policy waits until there is room. The operator has to free some space."
    )
    assert told == [Message(level="warn", message=sentence)]
    assert retry_while_unavailable(failing(), "exporting the policy", told.append) == "written"
    assert len(told) == 1


class Clock:
    """A clock that stands still, except while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(unavailable_storage, "time", clock)
    return clock


MINUTE = 60.0


def taking(clock: Clock, *calls: tuple[float, Exception]) -> Callable[[], str]:
    """Returns a function whose calls take so many seconds on the clock and fail. After them, calls succeed."""
    left = list(calls)

    def write() -> str:
        if left:
            seconds, error = left.pop(0)
            clock.sleep(seconds)
            raise error
        return "written"

    return write


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param([(60 * MINUTE, AWAY), (9 * MINUTE, AWAY)], id="the first call worked for an hour"),
        pytest.param([(1, AWAY), (60 * MINUTE, AWAY), (9 * MINUTE, AWAY)], id="a later call worked for an hour"),
        pytest.param([(9 * MINUTE, AWAY), (9 * MINUTE, FULL), (9 * MINUTE, AWAY)], id="storage was full meanwhile"),
    ],
)
def test_the_ten_minutes_begin_with_the_outage(clock: Clock, calls: list[tuple[float, Exception]]) -> None:
    assert retry_while_unavailable(taking(clock, *calls), "preparing data", lambda report: None) == "written"


def test_the_ten_minutes_end_while_storage_stays_away(clock: Clock) -> None:
    calls = [(1, AWAY), (4 * MINUTE, AWAY), (7 * MINUTE, AWAY)]
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        retry_while_unavailable(taking(clock, *calls), "preparing data", lambda report: None)


def test_a_storage_that_does_not_answer_is_waited_for() -> None:
    told: list[Message] = []
    in_a_task = RayTaskError("write", "its traceback", AWAY).as_instanceof_cause()
    assert retry_while_unavailable(failing(AWAY, in_a_task), "exporting the policy", told.append) == "written"
    sentence = "The storage does not answer; exporting the policy waits for it, ten minutes at most."
    assert told == [Message(level="warn", message=sentence)]


def test_arrow_says_that_a_storage_is_away(s3: S3) -> None:
    uri = storage.join(s3.new_folder(), "f")
    s3.proxy.refusing = True

    def write() -> None:
        try:
            storage.write_bytes(uri, b"whole")
        finally:
            s3.proxy.pass_on()

    retry_while_unavailable(write, "writing", lambda report: None)
    assert storage.read_bytes(uri) == b"whole"


def test_the_pauses_grow_to_a_minute_while_storage_is_full(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unavailable_storage, "FIRST_PAUSE_SECONDS", 5.0)
    retry_while_unavailable(failing(*[FULL] * 7), "exporting the policy", lambda report: None)
    assert clock.now == 5 + 10 + 20 + 40 + 60 + 60 + 60


def test_a_bucket_that_does_not_exist_is_not_waited_for(s3: S3) -> None:
    bucket = storage.join(f"s3://nobodys/raydpo/{s3.options}", "f")
    with pytest.raises(OSError, match="in bucket 'nobodys'"):
        retry_while_unavailable(lambda: storage.write_bytes(bucket, b"whole"), "writing", lambda report: None)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        RayTaskError("write", "its traceback", ValueError("no")),
        REFUSED,
        OSError("google::cloud::Status(PERMISSION_DENIED: Permanent error in GetObjectMetadata: denied)"),
        OSError("The file s3://bucket/rows.jsonl changed while it was being read."),
    ],
)
def test_other_failures_are_not_waited_for(error: Exception) -> None:
    with pytest.raises(type(error)):
        retry_while_unavailable(failing(error), "exporting the policy", lambda report: None)

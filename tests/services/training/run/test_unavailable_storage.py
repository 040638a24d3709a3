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
    monkeypatch.setattr(unavailable_storage, "PERIOD_SECONDS", 0.01)


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


def test_a_storage_that_does_not_answer_is_waited_for_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Message] = []
    in_a_task = RayTaskError("write", "its traceback", AWAY).as_instanceof_cause()
    assert retry_while_unavailable(failing(AWAY, in_a_task), "exporting the policy", told.append) == "written"
    sentence = "The storage does not answer; exporting the policy waits for it, ten minutes at most."
    assert told == [Message(level="warn", message=sentence)]
    monkeypatch.setattr(unavailable_storage, "MOST_AWAY_SECONDS", 0.1)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        retry_while_unavailable(failing(*[AWAY] * 1000), "exporting the policy", told.append)


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


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EACCES, "Permission denied"), RayTaskError("write", "its traceback", ValueError("no")), REFUSED],
)
def test_other_failures_are_not_waited_for(error: Exception) -> None:
    with pytest.raises(type(error)):
        retry_while_unavailable(failing(error), "exporting the policy", lambda report: None)

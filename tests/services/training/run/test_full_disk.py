import errno
from collections.abc import Callable

import pytest
from ray.exceptions import RayTaskError

from services.contract import Message
from services.training.run import full_disk
from services.training.run.full_disk import retry_while_full

FULL = OSError(errno.ENOSPC, "No space left on device")


def failing(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def write() -> str:
        if left:
            raise left.pop(0)
        return "written"

    return write


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_disk, "PERIOD_SECONDS", 0.01)


def test_what_finds_no_room_is_told_once_and_written_when_there_is_some() -> None:
    told: list[Message] = []
    in_a_task = RayTaskError("write", "its traceback", FULL).as_instanceof_cause()
    assert retry_while_full(failing(FULL, in_a_task, FULL), "exporting the policy", told.append) == "written"
    sentence = (
        "The storage is full; exporting the policy waits until there is room. The operator has to free some space."
    )
    assert told == [Message(level="warn", message=sentence)]
    assert retry_while_full(failing(), "exporting the policy", told.append) == "written"
    assert len(told) == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), RayTaskError("write", "its traceback", ValueError("no"))]
)
def test_other_failures_are_not_waited_for(error: Exception) -> None:
    with pytest.raises(type(error)):
        retry_while_full(failing(error), "exporting the policy", lambda report: None)

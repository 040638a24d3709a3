"""Tests the JSON of files, uploads and checks."""

from datetime import UTC, datetime

import pytest

from services.contract import Failed, SideJobResult
from services.control_plane.core.tables import File, Upload, UploadPart
from services.control_plane.files.responses import check_object, file_object, part_object, upload_object

AT = datetime(2026, 1, 2, tzinfo=UTC)
SECONDS = 1_767_312_000
REPORT = {"num_rows": 3}


def file(**more: object) -> File:
    given = {"id": "file-1", "created_at": AT, "filename": "a.jsonl", "purpose": "fine-tune", "num_bytes": 5}
    return File(**given | {"sha256": "ab", "report": REPORT} | more)


def test_a_file_tells_how_its_rows_are_read() -> None:
    reading = {"columns": {"q": "prompt"}, "invalid_rows": {"how": "drop", "max_share": 0.1}}
    told = file_object(file(reading=reading, expires_at=AT))
    assert (told["bytes"], told["created_at"], told["expires_at"]) == (5, SECONDS, SECONDS)
    assert told["x_raydpo"] == {
        "sha256": "ab",
        "report": REPORT,
        "checked_bytes": None,
        "columns": {"q": "prompt"},
        "invalid_rows": "drop",
        "max_invalid_share": 0.1,
    }
    usual = file_object(file())["x_raydpo"]
    assert (usual["columns"], usual["invalid_rows"], usual["max_invalid_share"]) == (None, "refuse", None)


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (file(), "processed"),
        (file(report=None), "uploaded"),
        (file(report=None, purpose="fine-tune-results"), "processed"),
        (file(report=None, refusal="Line 1 is empty."), "error"),
    ],
)
def test_the_status_of_a_file_follows_from_its_check(row: File, status: str) -> None:
    told = file_object(row)
    assert (told["status"], told["status_details"]) == (status, row.refusal)


def test_an_upload_has_its_file_once_it_is_complete() -> None:
    row = Upload(id="upload_1", created_at=AT, expires_at=AT, filename="a", purpose="fine-tune", num_bytes=5)
    assert upload_object(row, "expired", None)["file"] is None
    assert upload_object(row, "completed", file())["file"] == file_object(file())
    part = part_object(UploadPart(id="part_1", upload_id="upload_1", created_at=AT))
    assert part == {"id": "part_1", "object": "upload.part", "created_at": SECONDS, "upload_id": "upload_1"}


def test_a_check_tells_the_survey_while_it_runs_and_the_error_when_it_failed() -> None:
    running = check_object("check-1", file(), None, running=True)
    assert (running["status"], running["report"], running["error"]) == ("running", {"survey": REPORT}, None)
    done = check_object("check-1", file(), SideJobResult(finished_at=0, report={"tokens": {}}))
    assert (done["status"], done["report"]) == ("completed", {"survey": REPORT, "tokens": {}})
    failure = SideJobResult(finished_at=0, error=Failed(code="check_lost", message="It is lost."))
    failed = check_object("check-1", file(), failure)
    assert (failed["status"], failed["report"]) == ("failed", {"survey": REPORT})
    assert failed["error"] == {"code": "check_lost", "message": "It is lost.", "param": None}

"""Tests that the JSON of files, uploads and checks is what the OpenAPI document describes."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.contract import Reading
from services.control_plane.core.tables import File, Upload, UploadPart
from services.control_plane.files.check_program import check_rows
from services.control_plane.files.documents import CheckDocument, FileDocument, PartDocument, UploadDocument
from services.control_plane.files.responses import check_object, file_object, part_object, upload_object
from tests.services.control_plane.conftest import pairs
from tests.services.control_plane.documented import check

AT = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
def row(tmp_path: Path) -> File:
    path = tmp_path / "a.jsonl"
    path.write_bytes(pairs() + b"no row\n")
    report = check_rows(path.as_uri(), Reading())["report"]
    return File(
        id="file-1", created_at=AT, filename="a.jsonl", purpose="fine-tune", num_bytes=5, sha256="ab", report=report
    )


def test_files_are_as_described(row: File) -> None:
    check(FileDocument, file_object(row))
    row.report, row.num_checked, row.expires_at = None, 3, AT
    check(FileDocument, file_object(row))


def test_uploads_and_their_parts_are_as_described(row: File) -> None:
    upload = Upload(id="upload_1", created_at=AT, expires_at=AT, filename="a", purpose="fine-tune", num_bytes=5)
    for state, file in (("pending", None), ("completed", row)):
        check(UploadDocument, upload_object(upload, state, file))
    check(PartDocument, part_object(UploadPart(id="part_1", upload_id="upload_1", created_at=AT)))


def test_checks_are_as_described(row: File) -> None:
    check(CheckDocument, check_object("check-1", row, None, running=True))
    check(CheckDocument, check_object("check-1", row, None))

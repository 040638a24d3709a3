"""Tests the deletion of files and folders in storage."""

import asyncio
import logging
from pathlib import Path

import pytest

from services.control_plane.core.removal import remove_bytes


def test_a_file_and_a_folder_are_deleted_and_what_is_gone_already_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "part").write_bytes(b"1")
    (tmp_path / "file").write_bytes(b"2")
    for name in ("folder", "file", "file"):
        assert asyncio.run(remove_bytes((tmp_path / name).as_uri())), name
    assert list(tmp_path.iterdir()) == []


def test_what_is_to_be_kept_stays_with_the_folders_around_it(tmp_path: Path) -> None:
    for name in ("kept/one", "step/model/two", "step/state", "step/modelling", "other/three"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    kept = [(tmp_path / name).as_uri() for name in ("kept", "step/model")]
    assert asyncio.run(remove_bytes(tmp_path.as_uri(), but=[*kept, "s3://elsewhere/step"]))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["kept/one", "step/model/two"]


def test_a_deletion_that_fails_is_logged_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not asyncio.run(remove_bytes("ftp://somewhere/file"))
    assert "ftp://somewhere/file could not be deleted" in caplog.text

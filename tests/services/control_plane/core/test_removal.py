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


def test_a_deletion_that_fails_is_logged_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not asyncio.run(remove_bytes("ftp://somewhere/file"))
    assert "ftp://somewhere/file could not be deleted" in caplog.text

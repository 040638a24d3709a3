"""Tests the program that checks the rows of one file."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from services.contract import InvalidRows, Reading
from services.control_plane.files import check_program
from services.control_plane.files.check_program import check_rows
from tests.services.control_plane.conftest import pairs


def test_rows_beyond_the_share_that_may_be_dropped_are_a_refusal(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(pairs(9) + b'{"prompt": 5}\n')
    strict = check_rows(file.as_uri(), Reading(invalid_rows=InvalidRows(how="refuse", max_share=0.5)))
    assert (strict["report"]["num_rows"], strict["report"]["kind"]) == (10, "pairs")
    assert "Line 10" in strict["refusal"]
    for share, is_refused in ((0.05, True), (0.2, False)):
        dropping = Reading(invalid_rows=InvalidRows(how="drop", max_share=share))
        assert (check_rows(file.as_uri(), dropping)["refusal"] is not None) == is_refused


def test_how_far_it_is_is_told_in_bytes_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_program, "TELL_SECONDS", 0.0)
    file, told = tmp_path / "rows.jsonl", list[int]()
    file.write_bytes(pairs(2000))
    check_rows(file.as_uri(), Reading(), told.append)
    assert told == sorted(told)
    assert 0 < told[0] <= told[-1] <= file.stat().st_size


def test_the_program_ends_with_the_report_as_a_line_of_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(pairs(3)))
    command = [sys.executable, "-m", "services.control_plane.files.check_program", file.as_uri()]
    done = subprocess.run([*command, Reading().model_dump_json()], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == json.loads(json.dumps(check_rows(file.as_uri(), Reading())))
    assert (told["report"]["num_groups"], told["refusal"]) == (3, None)

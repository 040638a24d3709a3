"""Tests the log: as text and as JSON."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from services.control_plane.core import log_setup
from services.control_plane.core.telemetry import BACKGROUND_FAILURES


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_records_say_what_they_are_about(log_format: log_setup.LogFormat, tmp_path: Path) -> None:
    program = (
        "import logging; from pathlib import Path; from services.control_plane.core import log_setup\n"
        f"log_setup.configure({log_format!r}, Path({str(tmp_path / 'log')!r}))\n"
        "with log_setup.about(request_id='req_1'), log_setup.about(job_id='ftjob-1', attempt=2):\n"
        "    logging.getLogger('a').info('It %s.', 'works', extra={'status': 200})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    if log_format == "text":
        assert done.stderr == ""
        assert (tmp_path / "log").read_text().endswith("INFO a It works. request_id=req_1 job_id=ftjob-1 attempt=2\n")
        return
    line = json.loads(done.stderr)
    assert line.pop("time")
    assert line == {
        "level": "INFO",
        "logger": "a",
        "message": "It works.",
        "request_id": "req_1",
        "job_id": "ftjob-1",
        "attempt": 2,
        "status": 200,
    }


def test_a_trouble_that_lasts_is_counted_each_time_and_logged_at_growing_intervals(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    trouble = log_setup.Trouble(logging.getLogger("a"), "Sender")
    counted = BACKGROUND_FAILURES.labels("Sender")._value
    before = counted.get()
    trouble.passed()
    for _ in range(20):
        trouble.failed("It fails: %s", "no database")
    trouble.passed()
    trouble.failed("It fails: %s", "no database")
    assert counted.get() - before == 21
    lines = [f"It fails: no database (failures in a row: {count})" for count in (1, 2, 4, 8, 16)]
    assert caplog.messages == [*lines, "The part Sender works again after 20 failures in a row", lines[0]]

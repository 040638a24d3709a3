"""A program that checks the rows of one file in storage.

Its command is `python -m services.control_plane.files.check_program URI READING`, where READING are the options for
reading rows, as JSON. The check runs in a process of its own, because reading rows takes one core for minutes. The
program prints lines of JSON: every second the number of bytes that it has read, and at the end the report. The program
ends if nobody reads its output any more.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, BinaryIO

from dpo_core.data.survey import survey
from services import storage
from services.containers import json_lines
from services.contract import Reading

TELL_SECONDS = 1.0


def check_rows(uri: str, reading: Reading, tell: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Reads all rows of the file at `uri`, with the options `reading`, and returns a dictionary with two keys.

    `report` describes the rows: their format, their counts and their problems (class FeedbackReport). `refusal` is the
    reason to refuse the file, or None. Every second, calls `tell` with the number of bytes that were read so far.
    """
    share = reading.invalid_rows.max_share if reading.invalid_rows.how == "drop" else 0.0
    with storage.open_input(uri) as source:
        lines = json_lines(source)
        report = survey(_telling(lines, source, tell) if tell else lines, columns=reading.columns)
    return {"report": asdict(report), "refusal": report.refusal_beyond(share)}


def _telling(lines: Iterator[bytes], source: BinaryIO, tell: Callable[[int], None]) -> Iterator[bytes]:
    told = time.monotonic()
    for line in lines:
        yield line
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            tell(source.tell())


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main(uri: str, reading: str) -> None:
    os.nice(10)  # the control plane's requests come first
    how = Reading.model_validate_json(reading)
    _say(check_rows(uri, how, lambda num_bytes: _say({"num_checked": num_bytes})))


if __name__ == "__main__":
    main(*sys.argv[1:])

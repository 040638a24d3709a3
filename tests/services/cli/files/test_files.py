"""Tests the commands of files."""

import json

import pytest


@pytest.mark.slow
def test_files_are_uploaded_listed_shown_read_and_deleted(raydpo, pairs):
    stored = raydpo("files", "upload", pairs)
    assert stored.exit_code == 0, stored.output
    file_id = stored.stdout.strip()
    assert file_id in raydpo("files", "list").stdout
    assert json.loads(raydpo("files", "show", file_id).stdout)["filename"] == "pairs.jsonl"
    assert raydpo("files", "content", file_id).stdout == pairs.read_text()
    assert raydpo("files", "delete", file_id).exit_code == 0
    assert file_id not in raydpo("files", "list").stdout


def test_broken_row_is_refused_with_its_line_in_one_line(raydpo, pairs):
    lines = pairs.read_text().splitlines()
    pairs.write_text("\n".join([*lines[:6], "{", *lines[7:]]))
    refused = raydpo("files", "upload", pairs)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ")
    assert "Line 7" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_how_the_rows_of_a_file_are_read_is_said_with_it(raydpo, pairs):
    rows = [json.dumps({"ask": f"{i}?", "good": "Yes.", "bad": "No."}) for i in range(19)]
    pairs.write_text("\n".join([*rows, "{}"]))
    roles = [word for role in ("prompt=ask", "chosen=good", "rejected=bad") for word in ("--columns", role)]
    options = [*roles, "--max-invalid-share", 0.05]
    stored = raydpo("files", "upload", pairs, *options)
    assert stored.exit_code == 0, stored.output
    shown = json.loads(raydpo("files", "show", stored.stdout.strip()).stdout)["x_raydpo"]
    assert (shown["columns"]["prompt"], shown["invalid_rows"], shown["max_invalid_share"]) == ("ask", "drop", 0.05)
    created = raydpo("jobs", "create", "--model", "tiny", "--file", pairs, *options)
    assert created.exit_code == 0, created.output
    assert json.loads(raydpo("jobs", "show", created.stdout.strip()).stdout)["x_raydpo"]["columns"]["prompt"] == "ask"
    raydpo("jobs", "cancel", created.stdout.strip())
    refused = raydpo("jobs", "create", "--model", "tiny", "--file", stored.stdout.strip(), *options)
    assert "can be given for a job only with x_raydpo.dataset" in refused.stderr

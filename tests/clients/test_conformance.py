"""Tests that docs/wire/conformance.md is the table that a running service gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.programs import Address

TABLE = Path(__file__).parents[2] / "docs" / "wire" / "conformance.md"


@pytest.mark.slow
def test_the_table_is_what_a_running_service_answers(address: Address, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.clients.conformance", "tiny"]
    environment = os.environ | address.environment
    made = subprocess.run(command, cwd=TABLE.parents[2], env=environment, capture_output=True, text=True, timeout=500)
    assert made.returncode == 0, made.stderr
    assert "missing: " not in made.stdout
    (anew := tmp_path / TABLE.name).write_text(made.stdout)
    assert made.stdout == TABLE.read_text(), f"If this is meant: cp {anew} {TABLE}"

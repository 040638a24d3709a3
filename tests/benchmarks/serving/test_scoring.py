"""Tests that the benchmark of scoring compares engines that give the same scores."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving.engines import COLUMNS

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "serving" / "scoring.py"


@pytest.mark.long
@pytest.mark.ray
def test_all_engines_give_the_same_scores():
    command = [sys.executable, PROGRAM, "--sizes", "64x1", "--rows", "4", "--mean-length", "32", "--repeats", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    differences = {name: float(cells[-1]) for name, *cells in lines if name in COLUMNS}
    assert differences == pytest.approx(dict.fromkeys(COLUMNS, 0), abs=1e-3)

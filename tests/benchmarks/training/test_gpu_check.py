"""Tests benchmarks/training/gpu_check.py, the check of a machine with GPUs, on a machine without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.training.gpu_check import _run

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "benchmarks" / "training" / "gpu_check.py"
pytestmark = pytest.mark.slow


def check(folder, *options):
    """Runs the check, and returns the finished process, its report and its table."""
    json_file, table = folder / "check.json", folder / "check.md"
    command = [
        sys.executable,
        PROGRAM,
        f"--json={json_file}",
        f"--markdown={table}",
    ]
    run = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    return run, json.loads(json_file.read_text()), table.read_text()


@pytest.mark.long
def test_all_of_it_runs_on_a_cpu_in_small(tmp_path):
    run, report, table = check(tmp_path, "--device=cpu", "--size=tiny", "--seconds=1000")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "not done" not in table
    assert report["tests"]["told"].endswith("skipped")
    assert all(ours < 0.02 for ours, _ in report["parity"]["errors"].values())
    for columns in report["races"].values():
        assert columns.keys() == {"raydpo", "TRL at its best"}
        assert columns["raydpo"]["tokens"] > 0
        assert all(found["rows_per_second_with_reference"] > 0 for found in columns.values())


def test_without_a_gpu_its_tests_are_skipped():
    found = _run([str(PROGRAM), "--device=cpu", "--size=tiny", "--part=tests"], 900)
    assert found["passed"], found
    assert found["told"].endswith(" skipped")


def test_what_does_not_fit_into_its_seconds_is_told_in_the_table(tmp_path):
    run, report, table = check(tmp_path, "--device=cpu", "--size=tiny", "--seconds=0")
    assert run.returncode == 1
    assert table.count("**not done**: it had 0 seconds") == 2 + 4
    assert report["seconds"] < 1000


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, PROGRAM, f"--json={tmp_path / 'a'}"]
    run = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert run.returncode == 1
    assert "torch sees no CUDA device; --device cpu --size tiny" in run.stderr


def test_what_fails_is_told_in_its_last_line():
    assert _run(["-c", "raise MemoryError('out | of it')"], 60)["not_done"] == "MemoryError: out / of it"

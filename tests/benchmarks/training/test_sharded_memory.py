"""Tests that a rank holds only its share of a model that is split over ranks, from loading to training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "benchmarks" / "training" / "sharded_memory.py"
NOISE = 6_000_000  # bytes: buffers of gloo, and what Python allocates meanwhile


@pytest.mark.slow
def test_no_rank_holds_a_copy_of_the_whole_model(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, PROGRAM, "--hidden-size=256", f"--json={found}", "--ranks", "1", "2", "4"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    one, *several = json.loads(found.read_text())
    for rank in several:
        layer, outside, pack = rank["a layer"], rank["outside of layers"], one["above that share"]
        assert rank["above the share"] < layer + outside + NOISE
        # While ranks compute, two layers are whole, and so are their gradients; the reduction copies those of one.
        assert rank["above that share"] < pack + 5 * layer + 2 * outside + NOISE
        others = rank["all weights"] * (1 - 1 / rank["ranks"])  # a full copy would add the other ranks' shares
        assert others > 5 * layer + 2 * outside + NOISE

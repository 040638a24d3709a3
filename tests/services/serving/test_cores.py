"""Tests how many threads a replica may use."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ray
from services.serving.cores import num_threads
ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
print(ray.get(ray.remote(num_threads).remote()))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_replica_may_use_the_cpus_of_its_node_that_ray_may_use() -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, check=True, timeout=300)
    assert done.stdout.split()[-1] == b"1"

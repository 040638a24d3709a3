"""Tests how commands reach the workers and the driver of an attempt."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, time
import ray
from services.training.run import commands

class Reporter:
    def __init__(self):
        self.wish, self.closed, self.told = "run", 0, []

    def set(self, wish):
        self.wish = wish

    def command(self):
        return self.wish

    def beat(self):
        return self.wish, False

    def report(self, report):
        print("reported", type(report).__name__, flush=True)

    def close(self, seconds):
        print("closed", flush=True)

ray.init(address="auto", logging_level="ERROR")
commands.PERIOD_SECONDS = 0.1
reporter = ray.remote(num_cpus=0)(Reporter).remote()
with commands.pause_requests(reporter) as should_pause:
    assert not should_pause()
    ray.get(reporter.set.remote("pause"))
    deadline = time.monotonic() + 60
    while not should_pause():
        assert time.monotonic() < deadline
        time.sleep(0.05)
print("workers pause", flush=True)
ray.get(reporter.set.remote("run"))
handling = commands.Commands(reporter, [])
time.sleep(0.5)
if sys.argv[2] == "in time":
    handling.stop_handling()
ray.get(reporter.set.remote(sys.argv[1]))
time.sleep(1)
print("went on", flush=True)
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    ("command", "when", "status", "goes_on"),
    [("pause", "", 4, False), ("cancel", "", 5, False), ("fenced", "", 3, False), ("cancel", "in time", 0, True)],
)
def test_a_driver_ends_with_the_status_of_its_command_unless_it_is_ending_already(
    ray_environment: dict[str, str], command: str, when: str, status: int, goes_on: bool
) -> None:
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM, command, when]
    folder = Path(__file__).parents[4]
    done = subprocess.run(program, env=ray_environment, cwd=folder, stdout=subprocess.PIPE, timeout=300, check=False)
    said = done.stdout.decode()
    assert done.returncode == status
    assert "workers pause" in said
    assert ("went on" in said) == goes_on

"""Tests that a fork server that has imported Ray has drawn none of its random ids."""

import os
import subprocess
import sys

import pytest

from services.forkserver.server import ENVIRONMENT


@pytest.mark.slow
@pytest.mark.parametrize(
    "modules",
    [
        "services.training.driver.WORKERS_IMPORT",
        "services.serving.app.IMPORTS",
        "services.forkserver.client.DRIVERS_IMPORT",
    ],
)
def test_what_is_imported_lets_processes_be_forked(modules: str) -> None:
    """The imports start no thread and draw none of Ray's random ids, which all forks would share."""
    program = f"""
import importlib
from services.forkserver import loaded_ray, server
import {modules.rpartition(".")[0]}
for module in {modules}:
    importlib.import_module(module)
print(server._obstacle_now(), loaded_ray.has_drawn())
loaded_ray.UniqueID.from_random()
print(loaded_ray.has_drawn())
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode().splitlines()[-2:] == ["None False", "True"]

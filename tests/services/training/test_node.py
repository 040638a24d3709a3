"""Tests where actors beside the driver run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
import ray
from services.training.node import local_actor

class Actor:
    def where(self):
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_assigned_resources(), __import__("os").environ.get("SHOWN")

ray.init(address="auto", logging_level="ERROR")
actor = local_actor(Actor, runtime_env={"env_vars": {"SHOWN": "here"}}).remote()
node, resources, shown = ray.get(actor.where.remote())
print(json.dumps([node == ray.get_runtime_context().get_node_id(), resources, shown]))
"""


@pytest.mark.ray
def test_an_actor_runs_on_the_node_of_its_caller_reserves_no_cpu_and_takes_options(
    ray_environment: dict[str, str],
) -> None:
    command, folder = [sys.executable, "-W", "ignore", "-c", PROGRAM], Path(__file__).parents[3]
    done = subprocess.run(command, env=ray_environment, cwd=folder, stdout=subprocess.PIPE, check=True, timeout=300)
    is_here, resources, shown = json.loads(done.stdout.splitlines()[-1])
    assert (is_here, resources.get("CPU", 0), shown) == (True, 0, "here")

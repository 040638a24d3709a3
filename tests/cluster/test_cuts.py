"""Tests that work on a machine that was cut off goes on elsewhere, long before Ray's own settings would let it."""

from pathlib import Path

import pytest

from tests.cluster.machines import Network
from tests.cluster.service import running_service, wait_for
from tests.services.s3 import running_s3

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]

# A task that never ends on the first machine, and at once on any other.
WORKS = """
import socket, sys, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(sys.argv[1], log_to_driver=False)
while len(nodes := {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}) < 3:
    time.sleep(0.1)
first = nodes[sys.argv[2]]

@ray.remote(num_cpus=1, max_retries=3, scheduling_strategy=NodeAffinitySchedulingStrategy(first, soft=True))
def work(name):
    while socket.gethostname() == name:
        time.sleep(0.1)
    return socket.gethostname()

print("ended on", ray.get(work.remote(sys.argv[3])), flush=True)
"""


def test_a_task_on_a_machine_that_was_cut_off_ends_elsewhere(
    network: Network, database_url: str, tmp_path: Path
) -> None:
    with running_s3(network.host) as s3, running_service(network, s3, database_url, tmp_path) as service:
        service.start_head()
        left, _ = service.add_node("left", 1), service.add_node("right", 1)
        wait_for(lambda: service.head.processes("raylet/raylet"), "the head runs")
        log = tmp_path / "driver.txt"
        driver = service.head.spawn(
            *("python", "-c", WORKS, f"{service.head.address}:6379", left.address, left.name),
            log=log,
            environment=service.ray_environment,
        )
        wait_for(lambda: left.processes("ray::work"), "the task runs on the left machine")
        left.cut()
        # With the service's settings after 64 seconds when this was written, with Ray's own after 428.
        wait_for(lambda: driver.poll() is not None, "the task ends elsewhere", seconds=300)
        assert log.read_text().endswith("ended on right\n")

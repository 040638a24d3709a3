"""The node that a process runs on."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def local_actor(kind: type, **options: Any) -> Any:
    """The class as one of Ray's, whose actors run on this node and claim none of its CPUs; `options` are Ray's."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, **options)(kind)

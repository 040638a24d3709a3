"""Starts Ray actors on the node of the calling process."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def local_actor(kind: type, **options: Any) -> Any:
    """Returns the class `kind` as a Ray actor class. Its actors run on this process's node and reserve no CPU.

    `options` are passed to `ray.remote`.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, **options)(kind)

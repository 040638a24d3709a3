"""Starts Ray actors on the node on which the calling process runs."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def local_actor(kind: type, **options: Any) -> Any:
    """Returns the class `kind` as a Ray actor class. Actors of this class run on the node of this process and reserve
    no CPU.

    `options` are other arguments of `ray.remote`, such as a name.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, **options)(kind)

"""Computes how many threads a replica may use."""

import os

import ray


def num_threads() -> int:
    """Returns the number of CPUs that this node gives to Ray.

    Ray itself gives an actor one thread for each CPU that the actor reserves, here one.
    """
    node_id = ray.get_runtime_context().get_node_id()
    reserved = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == node_id)
    return max(1, min(os.cpu_count() or 1, int(reserved)))

"""Computes how many CPU threads a replica of a model may use."""

import os

import ray


def num_threads() -> int:
    """Returns the number of threads that a replica of a model may use: the number of this node's CPUs that Ray may use.

    Ray itself would give an actor one thread for each CPU that the actor reserves, and a replica reserves only one.
    """
    node_id = ray.get_runtime_context().get_node_id()
    reserved = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == node_id)
    return max(1, min(os.cpu_count() or 1, int(reserved)))

"""Starts a Ray cluster for a benchmark, with the settings of `raydpo up`."""

import os
from pathlib import Path


def start_ray(*, object_store_memory: int) -> None:
    """Starts a Ray cluster and connects this process to the cluster. `object_store_memory` is in bytes."""
    import ray

    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(
        address="local",
        num_cpus=max(8, 4 * (os.cpu_count() or 1)),
        object_store_memory=object_store_memory,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )

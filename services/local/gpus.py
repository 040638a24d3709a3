"""Chooses the default GPU settings of `raydpo up` from the GPUs of its machine."""

import os
import subprocess
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version

NAMES = ("num_gpus_per_worker", "num_gpus_per_model")
SECONDS = 10  # a working driver answers within this time


def defaults(configured: Collection[str]) -> tuple[dict[str, float], str]:
    """Returns default values for the GPU settings in NAMES that have no value yet, and a sentence for the user that
    names these defaults.

    `configured` holds the names of the settings that have a value. Each default is one whole GPU; jobs and models take
    turns if the machine has fewer GPUs than they need. Both results are empty on a machine without a GPU, or if no
    setting needs a default.
    """
    chosen = {name: 1.0 for name in NAMES if name not in configured}
    if not chosen or not (number := _count()):
        return {}, ""
    words = " and ".join(f"{name} is 1" for name in chosen)
    return chosen, f"GPUs on this machine: {number}, so {words}; to change this, set {' or '.join(chosen)}"


def _count() -> int:
    """Returns the number of GPUs that Ray will find.

    These are the GPUs of NVIDIA's driver that CUDA_VISIBLE_DEVICES leaves visible. The number is 0 if PyTorch is built
    for CPUs, as after `make setup ACCELERATOR=cpu`.
    """
    try:
        if version("torch").endswith("+cpu"):
            return 0
    except PackageNotFoundError:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    number = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return number
    return min(number, sum(each.strip() not in ("", "-1", "NoDevFiles") for each in visible.split(",")))

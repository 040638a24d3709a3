"""What `raydpo up` does with the GPUs of its machine unless the settings say otherwise."""

import os
import subprocess
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version

NAMES = ("num_gpus_per_worker", "num_gpus_per_model")
SECONDS = 10  # in which a driver that works has answered


def defaults(configured: Collection[str]) -> tuple[dict[str, float], str]:
    """A whole GPU for each worker and model that `configured` does not name; and that in words.

    Jobs and models take turns where there are fewer GPUs. Both are empty on a machine without any.
    """
    chosen = {name: 1.0 for name in NAMES if name not in configured}
    if not chosen or not (number := _count()):
        return {}, ""
    words = " and ".join(f"{name} is 1" for name in chosen)
    return chosen, f"GPUs: {number}; {words}, as no setting says otherwise"


def _count() -> int:
    """How many GPUs Ray will find here: those of NVIDIA's driver, unless CUDA_VISIBLE_DEVICES hides some.

    None where PyTorch is its build for CPUs, as after `make setup ACCELERATOR=cpu`.
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

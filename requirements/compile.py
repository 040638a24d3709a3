"""Compile the pinned sets from pyproject.toml. They name no host, and are installed with --no-deps."""

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
EVERYTHING = ["--extra=cluster", "--extra=local", "--extra=dev", f"--override={HERE / 'overrides.txt'}"]
# Where torch's CPU build is to be had: PyTorch's own index, or wheels at hand.
TORCH_CPU = (
    ["--find-links", wheels]
    if (wheels := os.environ.get("UV_FIND_LINKS"))
    else ["--extra-index-url=https://download.pytorch.org/whl/cpu", "--index-strategy=unsafe-best-match"]
)
SETS = {
    "cpu": [*EVERYTHING, "--extra=cpu", f"--override={HERE / 'cpu-overrides.txt'}", *TORCH_CPU],
    "gpu": [*EVERYTHING, "--extra=gpu"],
    "control-plane": [],
    "lm-eval": ["--extra=lm-eval", f"--constraint={HERE / 'control-plane.txt'}"],
}

environment = {name: value for name, value in os.environ.items() if name != "UV_FIND_LINKS"}
for name, options in SETS.items():
    command = [
        "uv",
        "pip",
        "compile",
        "pyproject.toml",
        *options,
        "--python-version=3.11",
        "--upgrade",
        "--no-annotate",
    ]
    command += ["--python-platform=x86_64-manylinux_2_28", "--custom-compile-command=make pins"]
    command += ["--quiet", "--output-file", str(HERE / f"{name}.txt")]
    subprocess.run(command, check=True, cwd=HERE.parent, env=environment)

"""Tests what the control plane imports when it starts."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_control_plane_loads_no_torch_ray_vllm_or_transformers() -> None:
    program = (
        "import sys; import services.control_plane.app, services.contract, dpo_core.config;"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

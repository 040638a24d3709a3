"""Tests that every Ray of ours has the settings with which it notices a node that was cut off.

docs/operate/reliability.md has the figures.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from services.local.ray_head import NOTICE_CUTS

ROOT = Path(__file__).parents[2]


def test_ray_reads_each_of_the_settings() -> None:
    names = [name.removeprefix("RAY_") for name in NOTICE_CUTS]
    program = f"import json, ray; print(json.dumps([getattr(ray._config, name)() for name in {names}]))"
    ray = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | NOTICE_CUTS, capture_output=True, text=True, check=True
    )
    assert [str(value) for value in json.loads(ray.stdout)] == ["20000", "20000", "3000", "3"]


def test_every_node_of_the_chart_has_them(manifests: list[dict[str, Any]]) -> None:
    (cluster,) = [manifest for manifest in manifests if manifest["kind"] == "RayCluster"]
    nodes = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    assert len(nodes) >= 2
    for node in nodes:
        environment = {entry["name"]: entry.get("value") for entry in node["template"]["spec"]["containers"][0]["env"]}
        assert NOTICE_CUTS.items() <= environment.items()


def test_the_ray_image_has_them() -> None:
    lines = (ROOT / "docker" / "ray.Dockerfile").read_text().replace("\\\n", "")
    given = dict(
        pair.split("=") for line in re.findall("^ENV (.*RAY_.*)$", lines, re.MULTILINE) for pair in line.split()
    )
    assert NOTICE_CUTS.items() <= given.items()

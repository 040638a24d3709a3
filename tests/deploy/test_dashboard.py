"""Tests that the Grafana dashboard uses exactly the metrics that the service exports."""

import json
import re
from pathlib import Path

from prometheus_client import Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from services.control_plane.core import telemetry

DEFINED = [metric for metric in vars(telemetry).values() if isinstance(metric, MetricWrapperBase)]
DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "raydpo.json"


def test_every_metric_is_shown_and_every_one_shown_exists() -> None:
    suffixes = {Counter: "_total", Histogram: "_bucket"}
    told = {f"{metric._name}{suffixes.get(type(metric), '')}" for metric in DEFINED}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = {name for panel in panels for each in panel["targets"] for name in re.findall(r"raydpo_\w+", each["expr"])}
    assert shown == told


def test_every_label_that_is_asked_for_is_told() -> None:
    asked = {name for names in re.findall(r"by \(([^)]*)\)", DASHBOARD.read_text()) for name in names.split(", ")}
    assert asked - {"le"} <= {name for metric in DEFINED for name in metric._labelnames}

"""Tests that the Grafana dashboard and the alerts use the metrics that the service exports."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from services.control_plane.core import telemetry
from services.control_plane.core.store import JOB_STATES
from tests.deploy.manifests import Manifest, labels, one
from tests.deploy.variants import VARIANTS

DEFINED = [metric for metric in vars(telemetry).values() if isinstance(metric, MetricWrapperBase)]
SUFFIXES = {Counter: "_total", Histogram: "_bucket"}
TOLD = {f"{metric._name}{SUFFIXES.get(type(metric), '')}": metric for metric in DEFINED}
ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "chart" / "grafana" / "raydpo.json"
RUNBOOK = (ROOT / "docs" / "operate" / "runbook.md").read_text()

Render = Callable[..., list[Manifest]]


@pytest.fixture
def rule(render: Render) -> Manifest:
    return one(render(VARIANTS["observed"]), "PrometheusRule")


@pytest.fixture
def alerts(rule: Manifest) -> dict[str, Any]:
    (group,) = rule["spec"]["groups"]
    return {alert["alert"]: alert for alert in group["rules"]}


def test_every_metric_is_shown_and_every_one_shown_exists() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = {name for panel in panels for each in panel["targets"] for name in re.findall(r"raydpo_\w+", each["expr"])}
    assert shown == set(TOLD)


def test_every_label_that_is_asked_for_is_told() -> None:
    asked = {name for names in re.findall(r"by \(([^)]*)\)", DASHBOARD.read_text()) for name in names.split(", ")}
    assert asked - {"le"} <= {name for metric in DEFINED for name in metric._labelnames}


def test_the_chart_gives_the_dashboard_to_grafana(render: Render) -> None:
    found = one(render(VARIANTS["observed"]), "ConfigMap", "dashboard")
    assert labels(found)["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["raydpo.json"]) == json.loads(DASHBOARD.read_text())


def test_alerts_ask_for_metrics_and_labels_that_the_service_tells(alerts: dict[str, Any]) -> None:
    expressions = [alert["expr"] for alert in alerts.values()]
    for name, matchers in re.findall(r"(raydpo_\w+)\{([^}]*)\}", " ".join(expressions)):
        asked = {matcher.partition("=")[0] for matcher in matchers.split(",")}
        assert asked - {"job", "namespace"} <= set(TOLD[name]._labelnames)
    assert set(re.findall(r'state="(\w+)"', " ".join(expressions))) - {"in_use"} <= set(JOB_STATES)
    for expression in expressions:  # all of them are of this release
        of_release = re.findall(r'\w+\{job="raydpo-prod-control-plane",namespace="ml"[,}]', expression)
        assert len(of_release) == expression.count("{") >= 1


def test_the_runbook_explains_each_alert(alerts: dict[str, Any], rule: Manifest) -> None:
    assert set(re.findall(r"^\| `(Raydpo\w+)`", RUNBOOK, re.MULTILINE)) == set(alerts)
    anchors = {title.lower().replace(" ", "-") for title in re.findall("^## (.*)$", RUNBOOK, re.MULTILINE)}
    for alert in alerts.values():
        page, _, section = alert["annotations"]["runbook"].partition("#")
        assert (ROOT / page).exists()
        assert section in anchors
    assert labels(rule)["release"] == "prometheus"


def test_the_alert_about_memory_knows_the_limit(render: Render) -> None:
    values = VARIANTS["observed"] | {"controlPlane": {"memory": "2Gi"}}
    (group,) = one(render(values), "PrometheusRule")["spec"]["groups"]
    (alert,) = [alert for alert in group["rules"] if alert["alert"] == "RaydpoMemoryUsedUp"]
    assert alert["expr"].endswith(f"> {int(0.9 * 2 * 2**30)}")

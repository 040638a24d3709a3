"""Tests that the examples fit the chart, and Kubernetes where its schemas are at hand."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import yaml

from tests.deploy.manifests import Manifest, container, labels, one, ray_groups, violations

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
PUBLIC = {"/v1", "/openapi.json", "/", "/assets"}
Render = Callable[..., list[Manifest]]


def read(name: str) -> dict[str, Manifest]:
    return {each["kind"]: each for each in yaml.safe_load_all((EXAMPLES / name).read_text())}


def test_the_pods_that_pull_the_image_ahead_are_restricted_and_pull_the_chart_s(chart: helm_python.Chart) -> None:
    pulling = read("pre-pull.yaml")["DaemonSet"]
    kubernetes_validate.validate(pulling, "1.37", strict=True)
    template = pulling["spec"]["template"]
    assert violations(template) == []
    assert container(template)["image"].rpartition("/")[2] == chart.values["images"]["rayGpu"]
    assert labels(template)["app"] == pulling["spec"]["selector"]["matchLabels"]["app"]


def test_the_ingress_fits_kubernetes_and_leads_to_the_api_and_the_page_alone(
    render: Render, minimal: dict[str, Any]
) -> None:
    ingress = read("ingress.yaml")["Ingress"]
    kubernetes_validate.validate(ingress, "1.37", strict=True)
    service = one(render(minimal, release="raydpo"), "Service")
    paths = ingress["spec"]["rules"][0]["http"]["paths"]
    assert {path["path"] for path in paths} == PUBLIC
    for path in paths:
        assert path["backend"]["service"]["name"] == service["metadata"]["name"]
        assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}


def test_the_route_of_the_gateway_leads_to_the_api_and_the_page_alone(render: Render, minimal: dict[str, Any]) -> None:
    objects = read("gateway.yaml")
    service = one(render(minimal, release="raydpo"), "Service")
    (rule,) = objects["HTTPRoute"]["spec"]["rules"]
    assert {match["path"]["value"] for match in rule["matches"]} == PUBLIC
    assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": service["spec"]["ports"][0]["port"]}]
    name = objects["Gateway"]["metadata"]["name"]
    assert objects["HTTPRoute"]["spec"]["parentRefs"] == [{"name": name}]
    assert objects["ClientTrafficPolicy"]["spec"]["targetRefs"][0]["name"] == name


def test_the_values_beside_kueue_s_queue_name_it(render: Render, minimal: dict[str, Any]) -> None:
    text = (EXAMPLES / "kueue.yaml").read_text()
    values = yaml.safe_load("\n".join(re.findall(r"^#   (.*)$", text, re.MULTILINE)))
    metadata = one(render(minimal | values), "RayCluster")["metadata"]
    queue = read("kueue.yaml")["LocalQueue"]
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert queue["spec"]["clusterQueue"] == read("kueue.yaml")["ClusterQueue"]["metadata"]["name"]
    (group,) = read("kueue.yaml")["ClusterQueue"]["spec"]["resourceGroups"]
    assert set(group["coveredResources"]) == {each["name"] for each in group["flavors"][0]["resources"]}


def test_argo_cd_leaves_to_ray_what_its_autoscaler_writes(render: Render) -> None:
    application = read("argocd.yaml")["Application"]["spec"]
    cluster = one(render(application["source"]["helm"]["valuesObject"]), "RayCluster")
    (ignored,) = application["ignoreDifferences"]
    assert (ignored["group"], ignored["kind"]) == ("ray.io", cluster["kind"])
    assert ".spec.workerGroupSpecs[].replicas" in ignored["jqPathExpressions"]
    assert cluster["spec"]["workerGroupSpecs"]
    assert "RespectIgnoreDifferences=true" in application["syncPolicy"]["syncOptions"]


def test_the_values_for_gpus_render(render: Render, minimal: dict[str, Any]) -> None:
    values = yaml.safe_load((EXAMPLES / "gpus.yaml").read_text())
    manifests = render(minimal | values)
    claim = read("models-claim.yaml")["PersistentVolumeClaim"]
    kubernetes_validate.validate(claim, "1.37", strict=True)
    assert claim["metadata"]["name"] == values["hub"]["cacheClaim"]
    assert list(ray_groups(manifests)) == ["head", "cpu", "h100", "l40s"]

"""Tests the chart's objects against the schemas of Kubernetes and KubeRay."""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import Manifest, pod_templates

CRD = Path(__file__).parents[3] / "shared" / "kuberay" / "crds" / "ray.io_rayclusters.yaml"


def strict(schema: Any) -> Any:
    """Returns the schema with unknown fields refused, where the API server would silently drop them."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        closed["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    return closed


@pytest.fixture(scope="module")
def ray_cluster_schema() -> jsonschema.Draft202012Validator:
    if not CRD.exists():
        pytest.skip("needs KubeRay's CRD schemas in ../shared/kuberay/crds")
    versions = yaml.load(CRD.read_bytes(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(schema))


def ray_cluster(manifests: list[Manifest]) -> Manifest:
    (cluster,) = [manifest for manifest in manifests if manifest["apiVersion"] == "ray.io/v1"]
    return cluster


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_every_object_fits_kubernetes(manifests: list[Manifest], version: str) -> None:
    others = ("ray.io/v1", "monitoring.coreos.com/v1")
    core = [manifest for manifest in manifests if manifest["apiVersion"] not in others]
    assert {manifest["kind"] for manifest in core} >= {"Deployment", "Service", "Job", "NetworkPolicy"}
    for manifest in core:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_every_pod_fits_kubernetes(manifests: list[Manifest], version: str) -> None:
    """KubeRay's schema is laxer about pods than Kubernetes, which then refuses the pods that the operator makes."""
    for name, template in pod_templates(manifests).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name} | template["metadata"]}
        kubernetes_validate.validate(pod | {"spec": template["spec"]}, version, strict=True)


def test_the_ray_cluster_fits_kuberay(
    manifests: list[Manifest], ray_cluster_schema: jsonschema.Draft202012Validator
) -> None:
    ray_cluster_schema.validate(ray_cluster(manifests))


@pytest.mark.parametrize(
    "path",
    [
        ["spec"],
        ["spec", "headGroupSpec", "template", "metadata"],
        ["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "securityContext"],
    ],
)
def test_a_field_unknown_to_kuberay_would_be_found(
    manifests: list[Manifest], ray_cluster_schema: jsonschema.Draft202012Validator, path: list[str | int]
) -> None:
    node = broken = copy.deepcopy(ray_cluster(manifests))
    for step in path:
        node = node[step]  # type: ignore[index]
    node["mistyped"] = 1
    assert [list(error.path) for error in ray_cluster_schema.iter_errors(broken)] == [path]

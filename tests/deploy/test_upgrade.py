"""Tests what an upgrade keeps of a RayCluster that runs, with a small server in the place of Kubernetes' API."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import helm_python
import pytest
import yaml

from tests.deploy.manifests import objects, ray_groups
from tests.deploy.variants import VARIANTS

KINDS = {
    "kind": "APIResourceList",
    "groupVersion": "ray.io/v1",
    "resources": [{"name": "rayclusters", "kind": "RayCluster", "namespaced": True, "verbs": ["get"]}],
}
LIVE = {"cpu": 3, "h100": 9, "a100-spot": 0, "mig": 2}
CLUSTER = {
    "apiVersion": "ray.io/v1",
    "kind": "RayCluster",
    "metadata": {"name": "raydpo-prod-ray", "namespace": "ml"},
    "spec": {"workerGroupSpecs": [{"groupName": name, "replicas": count} for name, count in LIVE.items()]},
}
ANSWERS = {
    "/apis/ray.io/v1": KINDS,
    "/apis/ray.io/v1/namespaces/ml/rayclusters/raydpo-prod-ray": CLUSTER,
}


class _Api(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path.partition("?")[0] in ANSWERS
        body = json.dumps(ANSWERS.get(self.path.partition("?")[0], {"kind": "Status", "code": 404})).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def cluster() -> Iterator[helm_python.Config]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Api) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "ml"}}],
            "current-context": "test",
        }
        with helm_python.Config(kubeconfig_content=yaml.safe_dump(kubeconfig), namespace="ml") as config:
            yield config
        server.shutdown()
        thread.join()


def replicas(config: helm_python.Config, chart: helm_python.Chart, **changes: Any) -> dict[str, int | None]:
    values = VARIANTS["several GPU groups"] | changes
    files = config.render(chart, values, name="prod", namespace="ml", is_upgrade=True)
    manifests = objects(files)
    return {name: group.get("replicas") for name, group in ray_groups(manifests).items() if name != "head"}


def test_an_upgrade_keeps_the_workers_that_the_autoscaler_started(
    cluster: helm_python.Config, chart: helm_python.Chart
) -> None:
    assert replicas(cluster, chart) == {"cpu": 3, "h100": 4, "a100-spot": 0, "mig": 2}  # 4 is h100's most
    assert replicas(cluster, chart, cpuWorkers={"minReplicas": 4, "maxReplicas": 9})["cpu"] == 4


def test_a_new_group_has_no_workers_to_keep(cluster: helm_python.Config, chart: helm_python.Chart) -> None:
    groups = [group | {"name": f"new-{group['name']}"} for group in VARIANTS["several GPU groups"]["gpuWorkers"]]
    kept = replicas(cluster, chart, gpuWorkers=groups)
    assert kept == {"cpu": 3, "new-h100": None, "new-a100-spot": None, "new-mig": None}

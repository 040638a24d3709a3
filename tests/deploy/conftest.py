"""Renders the Helm chart for tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]


@pytest.fixture
def minimal() -> dict[str, Any]:
    """Returns only the values that must be given."""
    return {
        "database": {"existingSecret": "postgres"},
        "storage": {"url": "s3://bucket/raydpo"},
        "api": {"existingSecret": "api-key"},
    }


@pytest.fixture
def full() -> dict[str, Any]:
    """Returns values of every group, all different from the defaults."""
    return {
        "database": {"existingSecret": "postgres", "key": "url", "directKey": "direct-url"},
        "storage": {
            "url": "gs://bucket/raydpo",
            "existingSecret": "bucket",
            "serviceAccountAnnotations": {"iam.gke.io/gcp-service-account": "raydpo@example.iam.gserviceaccount.com"},
        },
        "integrations": {"existingSecret": "followed"},
        "api": {
            "existingSecret": "api-key",
            "key": "bearer",
            "allowFrom": [{"podSelector": {"matchLabels": {"app": "web"}}}],
        },
        "models": {"tiny": "gs://bucket/models/tiny", "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct"},
        "settings": {
            "dtype": "bfloat16",
            "num_gpus_per_worker": 1,
            "num_gpus_per_model": 0.5,
            "dataset_uris": ["https://", "gs://bucket/rows/"],
            "webhook_urls": ["https://", "http://hooks.example.svc:8080/"],
            "max_upload_bytes": 2**34,
        },
        "observability": {
            "serviceMonitor": True,
            "serviceMonitorLabels": {"release": "prometheus"},
            "scrapeInterval": "15s",
            "scrapeAnnotations": True,
            "otlpEndpoint": "http://collector.observability:4318",
        },
        "images": {
            "controlPlane": "registry.example/raydpo-control-plane@sha256:" + "0" * 64,
            "pullPolicy": "Always",
            "pullSecrets": [{"name": "registry"}],
        },
        "controlPlane": {
            "replicas": 3,
            "serviceType": "LoadBalancer",
            "serviceAnnotations": {"example.com/internal": "true"},
            "nodeSelector": {"pool": "web"},
        },
        "ray": {"existingSecret": "ray-token", "idleTimeoutSeconds": 60},
        "head": {"memory": "16Gi", "tolerations": [{"operator": "Exists"}]},
        "cpuWorkers": {"minReplicas": 2, "maxReplicas": 20, "nodeSelector": {"pool": "cpu"}},
        "gpuWorkers": {"minReplicas": 1, "maxReplicas": 8, "gpus": 8, "cpu": "64", "memory": "512Gi"},
    }


@pytest.fixture(params=["minimal", "full"])
def values(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def chart() -> Iterator[helm_python.Chart]:
    with helm_python.Chart.load(Path(__file__).parents[2] / "deploy" / "chart") as chart:
        yield chart


@pytest.fixture(scope="session")
def render(chart: helm_python.Chart) -> Render:
    """Returns a function that renders the objects that `helm install <release> --namespace ml` would create."""

    def render(values: dict[str, Any], release: str = "prod") -> list[Manifest]:
        files = chart.render(values, name=release, namespace="ml")
        return [yaml.safe_load(text) for path, text in files.items() if path.endswith(".yaml") and text.strip()]

    return render


@pytest.fixture
def manifests(render: Render, values: dict[str, Any]) -> list[Manifest]:
    return render(values)

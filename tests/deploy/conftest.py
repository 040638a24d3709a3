"""Renders the Helm chart for tests."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest

from tests.deploy.manifests import Manifest, objects
from tests.deploy.variants import FULL, MINIMAL, VARIANTS

Render = Callable[..., list[Manifest]]


@pytest.fixture
def minimal() -> dict[str, Any]:
    """Returns only the values that must be given."""
    return copy.deepcopy(MINIMAL)


@pytest.fixture
def full() -> dict[str, Any]:
    """Returns values of every group, all different from the defaults."""
    return copy.deepcopy(FULL)


@pytest.fixture(params=VARIANTS)
def values(request: pytest.FixtureRequest) -> Any:
    return copy.deepcopy(VARIANTS[request.param])


@pytest.fixture(scope="session")
def chart() -> Iterator[helm_python.Chart]:
    with helm_python.Chart.load(Path(__file__).parents[2] / "deploy" / "chart") as chart:
        yield chart


@pytest.fixture(scope="session")
def render(chart: helm_python.Chart) -> Render:
    """Returns a function that renders the objects that `helm install <release> --namespace ml` would create."""

    def render(values: dict[str, Any], release: str = "prod") -> list[Manifest]:
        return objects(chart.render(values, name=release, namespace="ml"))

    return render


@pytest.fixture
def manifests(render: Render, values: dict[str, Any]) -> list[Manifest]:
    return render(values)

"""Provides a network of machines, where the system allows one."""

import shutil
from collections.abc import Iterator

import pytest

from tests.cluster.machines import Network, NoNamespaces, running_network


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if not shutil.which("ip"):
        pytest.skip("machines cannot be made of namespaces here: the program ip is missing, Debian's package iproute2")
    try:
        with running_network() as network:
            network.add("probe").kill()
            yield network
    except NoNamespaces as error:
        pytest.skip(f"machines cannot be made of namespaces here: {error}")

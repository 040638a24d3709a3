"""Provides a network of machines, where the system allows one."""

import shutil
from collections.abc import Iterator

import pytest

from tests.cluster.machines import PROGRAMS, Network, NoNamespaces, running_network


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if not shutil.which("ip"):
        pytest.skip("machines cannot be made of namespaces here: the program ip is missing, Debian's package iproute2")
    if PROGRAMS.is_relative_to("/tmp"):
        pytest.skip(f"a machine has a /tmp of its own, which hides {PROGRAMS}; clone the repository elsewhere")
    try:
        with running_network() as network:
            network.add("probe").kill()
            yield network
    except NoNamespaces as error:
        pytest.skip(f"machines cannot be made of namespaces here: {error}")

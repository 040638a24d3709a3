"""Tests OpenAI's published, unmodified clients, each with its acceptance program."""

import pytest

from tests.clients import installed
from tests.clients.programs import Address, has_node, run_node, run_python


@pytest.mark.slow
@pytest.mark.parametrize("version", installed.PYTHON)
def test_a_python_client_does_all_that_it_offers(address: Address, version: str) -> None:
    assert run_python(version, address) == f"openai {version}: all passed"


@pytest.mark.slow
@pytest.mark.skipif(not has_node(), reason="node and npm are not installed")
def test_the_node_client_does_all_that_it_offers(address: Address) -> None:
    assert run_node(address) == f"openai {installed.NODE}: all passed"

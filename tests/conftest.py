"""One PostgreSQL for each runner, a database of its own for each module that asks; what takes longest runs first."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest

from services.local.postgres import start_postgres, stop_postgres


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    # Not in pytest's folder: the next pytest closes that to all but its owner, and as root the server is another user.
    with TemporaryDirectory(prefix="raydpo-tests-", ignore_cleanup_errors=True) as folder:
        data = Path(folder).resolve() / "postgres"
        yield start_postgres(data)
        stop_postgres(data)


@pytest.fixture(scope="module")
def database_url(postgres_url: str) -> str:
    name = f"test_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres_url.replace("/postgres?", f"/{name}?")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two runners at the end, none waits long for the other."""
    slow = ("e2e", "ray")
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in slow])

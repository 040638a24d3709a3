"""Provides what all tests share: a PostgreSQL server, databases on it, and a small disk that a test can fill.

The server runs for the whole run of the tests. Each module that asks for a database gets its own.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
import pytest
from xdist.scheduler import LoadScopeScheduling

from services.local.postgres import start_postgres, stop_postgres
from tests import figures, reaper

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    where = "where the control plane's tests keep files: a local folder, or a bucket on an S3 server of the tests"
    parser.addoption("--storage", choices=["local", "s3"], default="local", help=where)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return  # one of several processes, which inherits the mark
    # Or Ray's workers would starve beside the other process's tests.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - as Ray spells it
    os.environ[reaper.MARK] = secrets.token_hex(8)
    reaper.start(os.getpid(), os.environ[reaper.MARK])
    config.pluginmanager.register(figures.Figures(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests that need Ray first.

    Two processes run the tests, and one of them runs those that need Ray. If that process began them late, it would end
    long after the other.
    """
    if len({item.nodeid for item in items}) < len(items):
        raise pytest.UsageError("Several tests have the same name, of which two processes would run one only.")
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


class OneRay(LoadScopeScheduling):
    """Divides the tests between two processes: one runs all files that need Ray, the other takes one file after
    another.

    So what those files share, such as a Ray cluster, is started only once.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if needs_ray(file) else file


@cache
def needs_ray(file: str) -> bool:
    return "mark.ray" in (ROOT / file).read_text()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRay:
    return OneRay(config, log)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    # Not in pytest's folder: the next pytest closes that to all but its owner, and as root the server is another user.
    with TemporaryDirectory(prefix="raydpo-tests-", ignore_cleanup_errors=True) as folder:
        data = Path(folder).resolve() / "postgres"
        yield start_postgres(data)
        stop_postgres(data)


def new_database(postgres_url: str) -> str:
    """Creates an empty database, whose name no other test has, and returns its URL."""
    name = f"test_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres_url.replace("/postgres?", f"/{name}?")


@pytest.fixture(scope="module")
def database_url(postgres_url: str) -> str:
    return new_database(postgres_url)


class Disk:
    """A disk of 64 MB in memory (tmpfs), which a test can fill."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._filler = folder, folder / "filler"

    def fill(self, *, leave: int = 0) -> None:
        """Fills the disk, and leaves `leave` bytes free, rounded to whole pages."""
        room = shutil.disk_usage(self.folder).free
        with suppress(OSError):  # who writes meanwhile takes of it
            self._filler.write_bytes(bytes(max(0, room - leave)))

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)

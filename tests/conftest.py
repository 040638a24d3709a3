"""One PostgreSQL for the whole run, a database of its own for each module that asks; a disk that fills up."""

import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest

from services.local.postgres import start_postgres, stop_postgres


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need minutes come first: of two processes that share all files, none then works alone at the end."""
    if len({item.nodeid for item in items}) < len(items):
        raise pytest.UsageError("Several tests have the same name, of which two processes would run one only.")
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


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


class Disk:
    """A tmpfs of 64 MB."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._filler = folder, folder / "filler"

    def fill(self, *, leave: int = 0) -> None:
        """All but so many bytes; tmpfs counts whole pages."""
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

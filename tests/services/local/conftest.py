import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def home():
    """Not under pytest's folder, which the next pytest closes to other users: as root, PostgreSQL is one."""
    with tempfile.TemporaryDirectory(prefix="raydpo-test-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()

import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def home():
    """Returns a new home folder for the service.

    It is outside of pytest's folder, which other users cannot enter. PostgreSQL runs as another user if the tests run
    as root.
    """
    with tempfile.TemporaryDirectory(prefix="raydpo-test-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()

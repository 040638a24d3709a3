"""Tests that `raydpo up` tells in one line why PostgreSQL or Ray cannot run."""

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.local.stack import running_stack


def test_the_reason_and_the_remedy_are_all_that_is_printed(home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:9/none")
    with running_stack(home, ray_address="http://127.0.0.1:9", database_url="postgresql://127.0.0.1:9/none"):
        done = CliRunner().invoke(
            app, ["up", "--home", str(home), "--ray-address", "http://127.0.0.1:9", "--port", "0"]
        )
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: The folder {home} is used by process")
    assert line.endswith("stop that process, or choose another --home.")

"""Tests the command as a whole: what its import loads, and its migrations."""

import subprocess
import sys
from pathlib import Path


def test_help_loads_nothing_heavy():
    script = "import sys; from services.cli.app import app; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    assert not {"openai", "fastapi", "sqlalchemy", "pyarrow", "ray", "torch"} & set(loaded)
    assert Path(sys.executable).with_name("raydpo").exists()


def test_migrate_says_in_one_line_that_the_url_is_not_postgresql_s():
    environment = {"PATH": "", "DATABASE_URL": "mysql://user:hidden@host/name"}
    migrate = [sys.executable, "-c", "from services.cli.app import app; app()", "migrate"]
    ended = subprocess.run(migrate, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: the database's URL begins with mysql://, which is not PostgreSQL;")
    assert "Traceback" not in ended.stderr
    assert "hidden" not in ended.stderr

"""Runs the acceptance programs, and tells them by their environment where the service is."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.clients import installed
from tests.services.control_plane.http.test_idempotency import DroppingProxy

HERE = Path(__file__).parent


class FlakyProxy(DroppingProxy):
    """Loses the first answer of every other connection."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self._number = 0

    def _serve(self, client: Any) -> None:
        self._number += 1
        self.drops = self._number % 2
        super()._serve(client)


@dataclass(frozen=True)
class Address:
    """Says where a program finds the service. `environment` has the variables that the acceptance programs read."""

    url: str
    flaky: FlakyProxy
    api_key: str
    hooks_port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": self.api_key,
            "FLAKY_BASE_URL": f"http://127.0.0.1:{self.flaky.port}/v1",
            "HOOKS_PORT": str(self.hooks_port),
        }


def run_python(version: str, address: Address) -> str:
    return _run([installed.python(version), HERE / "strict.py", HERE / "acceptance.py", "tiny"], address)


def run_node(address: Address) -> str:
    program = shutil.copy(HERE / "acceptance.mjs", installed.node_modules(installed.NODE))
    return _run(["node", program, "tiny"], address)


def has_node() -> bool:
    return bool(shutil.which("node") and shutil.which("npm"))


def _run(command: list[str | Path], address: Address) -> str:
    """Runs the program without this project on its path, and returns the last line that it printed."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    done = subprocess.run(command, env=kept | address.environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]

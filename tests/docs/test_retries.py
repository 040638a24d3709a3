"""Tests that docs/operate/reliability.md names every loop of the code that waits before it goes on."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "operate" / "reliability.md"

# Functions with pauses that try nothing again: they look regularly at something, wait for an end, or let others run.
OTHERS = {
    "services/cli/jobs/logs.py::read_logs",
    "services/cli/jobs/sweeps.py::_wait_until_ended",
    "services/cli/models/evaluations.py::wait_until_ended",
    "services/cli/models/models.py::warm",
    "services/cli/models/rounds.py::wait_until_ended",
    "services/cli/service/up.py::_announce",
    "services/control_plane/auth/authentication.py::Authentication.run",
    "services/control_plane/cleanup.py::_remove",
    "services/control_plane/evaluations/work.py::Work.run",
    "services/control_plane/evaluations/work.py::Work._take",  # the pause that `Work._wait` has set
    "services/control_plane/http/refusals.py::Refusals.run",
    "services/control_plane/progress/streams.py::News.tell",
    "services/control_plane/side_jobs.py::result_of",
    "services/control_plane/tenants/usage.py::UsageRecorder.run",
    "services/forkserver/client.py::_wait_until_listening",
    "services/local/postgres.py::start_postgres",
    "services/local/ray_head.py::start_ray",
    "services/serving/adapters.py::Adapters._remove",
    "services/training/run/commands.py::Commands._listen",
    "services/training/run/commands.py::Commands._pause_within",
}


def functions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Yields the functions of a module with their names, those of methods as `Class.method`."""
    for node in ast.parse(path.read_text()).body:
        for each in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (each.name if each is node else f"{node.name}.{each.name}"), each  # type: ignore[attr-defined]


def sleeps(function: ast.AST) -> bool:
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return any(isinstance(call, ast.Attribute) and call.attr == "sleep" for call in calls)


def test_every_loop_that_pauses_is_in_the_table_and_every_function_of_the_table_exists() -> None:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    named = set(re.findall(r"`((?:services|dpo_core)/\S+\.py::[\w.]+)` \|$", "\n".join(rows), re.MULTILINE))
    found = {
        f"{path.relative_to(ROOT)}::{name}": function
        for folder in ("services", "dpo_core")
        for path in (ROOT / folder).rglob("*.py")
        for name, function in functions(path)
    }
    assert len(named) > 30
    assert named <= found.keys()
    assert {name for name, function in found.items() if sleeps(function)} <= named | OTHERS
    assert not named & OTHERS
    assert found.keys() >= OTHERS

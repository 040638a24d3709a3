"""Tests that every module has its test beside it: `tests/<the same path>/test_<module>.py`."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_module_of_the_engine_and_of_the_services_has_a_test_of_its_own() -> None:
    modules = [
        path.relative_to(ROOT)
        for root in ("dpo_core", "services")
        for path in (ROOT / root).rglob("*.py")
        if not path.name.startswith("__") and "migrations" not in path.parts
    ]
    assert len(modules) > 250
    assert not [str(path) for path in modules if not (ROOT / "tests" / path.with_name(f"test_{path.name}")).exists()]

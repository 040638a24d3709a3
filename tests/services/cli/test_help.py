"""Tests that the help text of every command says what it does, and that of every option what its default is."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from services.cli.app import app


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    yield " ".join(path) or "raydpo", command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_leaves_nothing_open(name: str) -> None:
    command = COMMANDS[name]
    assert (command.help or "").endswith("."), f"raydpo {name} does not say what it does"
    for option in command.params:
        if option.name.endswith("_completion"):
            continue
        said = option.help or ""
        assert said.endswith("."), f"raydpo {name} {option.opts[0]} does not say what it is for"
        if option.param_type_name == "argument":
            continue
        if option.default is None and not option.required and not option.multiple and not option.is_flag:
            assert "Default: " in said, f"raydpo {name} {option.opts[0]} does not say what holds without it"

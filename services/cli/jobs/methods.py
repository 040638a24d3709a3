"""The `raydpo methods` command: list the training objectives and their options."""

import json
from difflib import get_close_matches
from typing import Annotated, Any

import typer

from dpo_core.methods import METHODS, described
from services.cli.client import fail, out, print_rows
from services.cli.lists import AsJson, Columns, print_items

HEAD = """\
| `method.type` | options, their defaults, and what they may be | learns from | reference | what it is |
|---|---|---|---|---|
"""


def register(app: typer.Typer) -> None:
    app.command()(methods)


def methods(
    method: Annotated[
        str | None, typer.Argument(help="Name of the objective to show in full. Default: list all objectives.")
    ] = None,
    as_json: AsJson = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the objectives as a Markdown table, as in docs/use/objectives.md.")
    ] = False,
) -> None:
    """List the training objectives, each with its kind of data, options, defaults, ranges and papers."""
    if method is not None and method not in METHODS:
        close = get_close_matches(method, METHODS, n=1)
        guess = f"; did you mean {close[0]}?" if close else "."
        fail(f"{method} is not a method{guess} Choose one of {', '.join(METHODS)}.")
    found = [described(kind) for kind in ([method] if method else METHODS)]
    if markdown:
        typer.echo(HEAD + "".join(map(_row, found)), nl=False)
    elif method and not as_json:
        _print(found[0])
    else:
        columns: Columns = {
            "method": "id",
            "learns from": lambda each: ", ".join(each["learns_from"]),
            "options": lambda each: " ".join(
                f"{name}={_shown(option['default'])}" for name, option in each["hyperparameters"].items()
            ),
            "paper": lambda each: " ".join(each["papers"]),
        }
        print_items(found, columns, as_json)


def _print(method: dict[str, Any]) -> None:
    out.print(method["description"])
    out.print(f"Learns from {' or '.join(method['learns_from'])}.", *method["papers"])
    options = method["hyperparameters"] | method["common_hyperparameters"]
    rows = [(name, _default(option), option["range"], option["description"]) for name, option in options.items()]
    print_rows(["option", "default", "range", "description"], rows)


def _default(option: dict[str, Any]) -> str:
    of_adapters = option.get("default_of_adapters")
    return _shown(option["default"]) + (f" ({_shown(of_adapters)} of an adapter)" if of_adapters else "")


def _row(method: dict[str, Any]) -> str:
    options = [
        f"`{name}` {_shown(option['default'])}" + (f" ({option['range']})" if option["range"] else "")
        for name, option in method["hyperparameters"].items()
    ]
    kinds, reference = ", ".join(method["learns_from"]), "yes" if method["needs_reference"] else "no"
    return f"| `{method['id']}` | {'; '.join(options) or '—'} | {kinds} | {reference} | {method['description']} |\n"


def _shown(default: object) -> str:
    """Returns an option's default value as text. A list becomes its items with commas in between; an objective in the
    list becomes its type, such as `dpo`."""
    if isinstance(default, list | tuple):
        return ",".join(part["type"] if isinstance(part, dict) else _shown(part) for part in default)
    return default if isinstance(default, str) else json.dumps(default)

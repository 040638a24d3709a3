"""The `raydpo audit` command: list the changes made through the API and the requests that the service refused."""

from typing import Any

import typer

from services.cli.lists import Columns, date, list_command


def register(app: typer.Typer) -> None:
    columns: Columns = {
        "when": date("created_at"),
        "key": "key_id",
        "action": "action",
        "object": lambda entry: entry["object_id"] or "",
        "result": _result,
    }
    what = "List changes and refused requests with the API key that made each, newest first. Needs an admin key."
    list_command(app, "/x/audit", what, columns, name="audit")


def _result(entry: dict[str, Any]) -> str:
    code, number = entry["code"], entry["num_requests"]
    return f"{entry['status']}{f' {code}' if code else ''}{f', {number} times' if number > 1 else ''}"

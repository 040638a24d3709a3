"""raydpo audit: who changed what."""

import typer

from services.cli.lists import Columns, date, list_command


def register(app: typer.Typer) -> None:
    columns: Columns = {"when": date("created_at"), "key": "key_id", "action": "action", "object": "object_id"}
    list_command(app, "/x/audit", "Who changed what, newest first. Needs an admin key.", columns, name="audit")

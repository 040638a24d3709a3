"""raydpo audit: who changed what."""

from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.client import api_command, pages, print_rows

if TYPE_CHECKING:
    from openai import OpenAI


def register(app: typer.Typer) -> None:
    api_command(app)(audit)


def audit(client: "OpenAI", limit: Annotated[int, typer.Option(help="So many of the last.", min=1)] = 100) -> None:
    """Who changed what, newest first. Needs an admin key."""
    rows = [
        (datetime.fromtimestamp(entry["created_at"]), entry["key_id"], entry["action"], entry["object_id"])
        for entry in islice(pages(client, "/x/audit"), limit)
    ]
    print_rows(["when", "key", "action", "object"], rows)

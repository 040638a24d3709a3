"""raydpo audit: who changed what."""

from datetime import datetime
from typing import TYPE_CHECKING

import typer

from services.cli.client import Limit, api_command, first, pages, print_rows

if TYPE_CHECKING:
    from openai import OpenAI


def register(app: typer.Typer) -> None:
    api_command(app)(audit)


def audit(client: "OpenAI", limit: Limit = 100) -> None:
    """Who changed what, newest first. Needs an admin key."""
    rows = [
        (datetime.fromtimestamp(entry["created_at"]), entry["key_id"], entry["action"], entry["object_id"])
        for entry in first(pages(client, "/x/audit"), limit)
    ]
    print_rows(["when", "key", "action", "object"], rows)

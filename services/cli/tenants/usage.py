"""The `raydpo usage` command: list how many requests, tokens and accelerator seconds projects, keys and models used."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from services.cli.client import api_command
from services.cli.lists import AsJson, Columns, Limit, show_list

if TYPE_CHECKING:
    from openai import OpenAI

COLUMNS: Columns = {
    "id": "id",
    "requests": "num_requests",
    "prompt tokens": "prompt_tokens",
    "completion tokens": "completion_tokens",
    "accelerator seconds": "accelerator_seconds",
}


def register(app: typer.Typer) -> None:
    @api_command(app)
    def usage(
        client: "OpenAI",
        by: Annotated[
            Literal["project", "key", "model", "day"],
            typer.Option(help="What each row of the report sums up: a project, a key, a model or a day."),
        ] = "day",
        first: Annotated[
            str | None,
            typer.Option(
                "--from",
                metavar="YYYY-MM-DD",
                help="First day of the report (inclusive, in UTC). Default: 29 days before the last day.",
            ),
        ] = None,
        last: Annotated[
            str | None,
            typer.Option(
                "--to", metavar="YYYY-MM-DD", help="Last day of the report (inclusive, in UTC). Default: today."
            ),
        ] = None,
        limit: Limit = 100,
        as_json: AsJson = False,
    ) -> None:
        """List the number of completion requests, and the tokens and accelerator seconds that they used. Needs an admin
        key."""
        asked = {"group_by": by} | {name: day for name, day in (("from", first), ("to", last)) if day}
        show_list(client, "/x/usage", COLUMNS, limit, as_json, asked)

"""raydpo models: base models and trained policies."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.client import Limit, api_command, first, out, pages, print_rows

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(help="Base models and trained policies; alone, it lists them.")

ModelId = Annotated[str, typer.Argument(metavar="ID")]


@api_command(app, "list")
def list_models(client: "OpenAI", limit: Limit = 100) -> None:
    """Models that can be trained or queried: bases, then policies, newest first."""
    found = first(pages(client, "/models"), limit)
    rows = [(model["id"], model["owned_by"], datetime.fromtimestamp(model["created"])) for model in found]
    print_rows(["id", "owner", "created"], rows)


@app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_models()


@api_command(app)
def show(client: "OpenAI", model_id: ModelId) -> None:
    """What is known of a model."""
    out.print_json(client.models.retrieve(model_id).model_dump_json())


@api_command(app)
def delete(client: "OpenAI", model_id: ModelId) -> None:
    """Remove a trained policy and its weights."""
    client.models.delete(model_id)
    out.print(f"deleted {model_id}")

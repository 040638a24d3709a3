"""raydpo models: base models and trained policies."""

from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.client import api_command, out
from services.cli.lists import date, list_command

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(help="Base models and trained policies; alone, it lists them.")

ModelId = Annotated[str, typer.Argument(metavar="ID")]


list_models = list_command(
    app,
    "/models",
    "Models that can be trained or queried.",
    {"id": "id", "owner": "owned_by", "created": date("created")},
)


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

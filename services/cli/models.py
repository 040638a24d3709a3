"""The `raydpo models` commands: list, show, delete and share base models and trained policies."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, fail, id_argument, out
from services.cli.lists import AsJson, Columns, Limit, date, list_command, show_list

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(help="List, show, delete and share models. Without a command, list all models.")

ModelId = Annotated[str, id_argument()]


list_models = list_command(
    app,
    "/models",
    "List all models that can be trained or queried.",
    {"id": "id", "owner": "owned_by", "created": date("created")},
)


@app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_models()


@api_command(app)
def show(client: "OpenAI", model_id: ModelId) -> None:
    """Show all fields of a model as JSON."""
    out.print_json(client.models.retrieve(model_id).model_dump_json())


@api_command(app)
def delete(client: "OpenAI", model_id: ModelId) -> None:
    """Delete a trained policy and its weights."""
    client.models.delete(model_id)
    out.print(f"deleted {model_id}")


@api_command(app)
def share(
    client: "OpenAI",
    model_id: ModelId,
    project_ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROJECT]...",
            help="Ids of the projects to share the policy with. Default: list the projects that already have access.",
        ),
    ] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """Let other projects query a trained policy and train the policy further. Needs an admin key."""
    if project_ids:
        client.post(_permissions(model_id), body={"project_ids": project_ids}, cast_to=object)
    columns: Columns = {"project": "project_id", "since": date("created_at")}
    show_list(client, _permissions(model_id), columns, limit, as_json)


@api_command(app)
def unshare(client: "OpenAI", model_id: ModelId, project_id: Annotated[str, id_argument("PROJECT")]) -> None:
    """End a project's access to a trained policy. Jobs that the project has submitted continue. Needs an admin key."""
    params = {"project_id": project_id}
    found: Any = client.get(_permissions(model_id), cast_to=object, options={"params": params})
    if not found["data"]:
        fail(
            f"{model_id} is not shared with {project_id}; `raydpo models share {model_id}` lists projects with access."
        )
    client.delete(f"{_permissions(model_id)}/{found['data'][0]['id']}", cast_to=object)
    out.print(f"no longer shared with {project_id}")


def _permissions(model_id: str) -> str:
    return f"/fine_tuning/checkpoints/{model_id}/permissions"

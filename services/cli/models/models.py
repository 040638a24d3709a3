"""The `raydpo models` commands: list, show, load, download, delete and share base models and trained policies."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from services.cli.client import api_command, err, fail, id_argument, out
from services.cli.lists import AsJson, Columns, Limit, date, list_command, show_list
from services.cli.models.deployments import path_of

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(help="List, show, load, download, delete and share models. Without a command, list all models.")

WARM_SECONDS = 2.0  # between two looks at a model that loads

ModelId = Annotated[str, id_argument("Name of the model.")]
Format = Annotated[
    Literal["adapter", "merged"] | None,
    typer.Option(
        help="Which weights to write. adapter: only the adapter. merged: all weights, after the service has merged the "
        "adapter into its base model in float32. Default: the adapter if the policy has one, else all weights."
    ),
]


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
def download(
    client: "OpenAI",
    model_id: ModelId,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write the model to. The folder must be empty or not exist.")
    ],
    format: Format = None,
) -> None:
    """Download the weights of a trained policy as a Hugging Face folder.

    If the download is interrupted, run the command again to continue it. The command verifies the download before it
    unpacks the files.
    """
    from services.cli.models.weights import Download

    _tell(Download(client, model_id, format, folder).run())
    out.print(str(folder))


@api_command(app)
def push(
    client: "OpenAI",
    model_id: ModelId,
    target: Annotated[
        str,
        typer.Argument(
            metavar="hf://ORG/NAME",
            help="Repository on the Hugging Face hub to upload to, such as hf://organization/name.",
        ),
    ],
    format: Format = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public",
            help="If the repository does not exist yet, create it as a public one, which everybody can read. Default: "
            "create a private one.",
        ),
    ] = False,
) -> None:
    """Upload the weights of a trained policy to the Hugging Face hub.

    The command downloads the weights to this machine and uploads them with the token in HF_TOKEN or from `hf auth
    login`. The service does not see the token.
    """
    from services.cli.models.weights import Download, hub_name, push

    hub_name(target)  # refuses a wrong name before the download
    with tempfile.TemporaryDirectory(prefix="raydpo-push-") as folder:
        about = Download(client, model_id, format, Path(folder) / "model").run()
        _tell(about)
        out.print(push(Path(folder) / "model", target, public=public, summary=f"{model_id}, {about['format']}"))


def _tell(about: dict[str, Any]) -> None:
    """Prints what a downloaded model is: an adapter of a base model, or a merged model and how exact the merge is.
    `about` is the content of its file raydpo.json."""
    if about["merge"]:
        difference, of = about["merge"]["largest_difference"], about["merge"]["difference_of"]
        err.print(f"merged into {about['base']}; {of} differ from the adapter's by at most {difference:.1e}")
    elif about["base"]:
        err.print(f"an adapter of {about['base']}")


@api_command(app)
def delete(client: "OpenAI", model_id: ModelId) -> None:
    """Delete a trained policy and its weights."""
    client.models.delete(model_id)
    out.print(f"deleted {model_id}")


@api_command(app)
def warm(client: "OpenAI", model_id: ModelId) -> None:
    """Load a model now, and wait until it can answer. Meanwhile the command prints what the model waits for."""
    told = ""
    while True:
        found: Any = client.post(f"{path_of(model_id)}/warm", cast_to=object)
        if found["state"] == "running":
            out.print(f"{model_id} is loaded")
            return
        if found["state"] == "failed":
            fail(f"{model_id} could not be loaded: {found['error']}")
        why = f"{found['state']}{': ' if found['waits_for'] else ''}{found['waits_for'] or ''}"
        if why != told:
            err.print(f"{model_id} is {why}")
        told = why
        time.sleep(WARM_SECONDS)


@api_command(app)
def unload(client: "OpenAI", model_id: ModelId) -> None:
    """Unload an idle model, which frees its memory. The next request for the model loads it again."""
    client.post(f"{path_of(model_id)}/unload", cast_to=object)
    out.print(f"unloaded {model_id}")


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
def unshare(
    client: "OpenAI",
    model_id: ModelId,
    project_id: Annotated[str, id_argument("Id of the project that loses access.", "PROJECT")],
) -> None:
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

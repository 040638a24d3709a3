"""The `raydpo keys` commands: create, list and revoke API keys of the service."""

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, err, fail, id_argument, out
from services.cli.lists import list_command

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys. Needs an admin key.")

DAY = 86_400


@api_command(app)
def create(
    client: "OpenAI",
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new key, which `raydpo keys list` shows.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="Scope (permission) of the new key: read, write, inference or admin. Repeatable. Default: read, write "
            "and inference."
        ),
    ] = None,
    project: Annotated[
        str | None,
        typer.Option(
            help="Id of the project that the new key belongs to. Default: the project of the key you are using."
        ),
    ] = None,
    days: Annotated[
        float | None, typer.Option(help="Days until the new key expires. Default: the key never expires.")
    ] = None,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of requests per minute with the new key. "
            "Default: the service's setting requests_per_minute."
        ),
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens per minute, in prompts and completions together, with the new key. Default: "
            "the service's setting tokens_per_minute."
        ),
    ] = None,
) -> None:
    """Create an API key and print the key, which cannot be shown again."""
    body: dict[str, Any] = {"name": name, "project_id": project, "requests_per_minute": requests_per_minute}
    body["tokens_per_minute"] = tokens_per_minute
    if scope:
        body["scopes"] = scope
    if days is not None:
        body["expires_at"] = int(time.time() + days * DAY)
    key: Any = client.post("/x/keys", cast_to=object, body=body)
    if key["value"] is None:
        fail(f"the response with the value of key {key['id']} was lost; revoke that key, and create another key.")
    err.print(f"{key['id']}: {', '.join(key['scopes'])} in {key['project_id']}")
    out.print(key["value"])


def _state(key: dict[str, Any]) -> str:
    if key["revoked_at"]:
        return "revoked"
    if key["expires_at"]:
        ends = datetime.fromtimestamp(key["expires_at"])
        return f"expired {ends}" if key["expires_at"] <= time.time() else f"until {ends}"
    return "works"


list_command(
    app,
    "/x/keys",
    "List the API keys that you manage, newest first.",
    {
        "id": "id",
        "name": "name",
        "project": "project_id",
        "key": "redacted_value",
        "scopes": lambda key: ",".join(key["scopes"]),
        "state": _state,
    },
)


@api_command(app)
def revoke(
    client: "OpenAI",
    key_id: Annotated[str, id_argument("Id of the API key, which `raydpo keys list` shows; not the key itself.")],
) -> None:
    """Revoke an API key. The key stops working within a second."""
    client.post(f"/x/keys/{key_id}/revoke", cast_to=object)
    out.print(f"revoked {key_id}")

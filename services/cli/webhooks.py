"""raydpo webhooks: where this project is told of its jobs."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, err, out
from services.cli.lists import list_command

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(no_args_is_help=True, help="Where this project is told that its jobs ended.")

# By path, since older clients have no methods for these.
PATH = "/webhook_endpoints"
EndpointId = Annotated[str, typer.Argument(metavar="ID")]
Events = Annotated[list[str] | None, typer.Option("--event", help="Type of event, repeated; without it all.")]


def _state(endpoint: dict[str, Any]) -> str:
    return "disabled: it was gone" if endpoint["x_raydpo"]["disabled_at"] else "enabled"


list_command(
    app,
    PATH,
    "Endpoints, newest first.",
    {
        "id": "id",
        "name": "name",
        "url": "url",
        "events": lambda endpoint: " ".join(endpoint["event_types"]),
        "state": _state,
    },
)


@api_command(app)
def create(
    client: "OpenAI",
    receiver: Annotated[str, typer.Argument(metavar="URL", help="https://…, which answers POST.")],
    event: Events = None,
    name: Annotated[str, typer.Option(help="For people.")] = "raydpo",
) -> None:
    """Add an endpoint; prints its id, and the secret that signs, which is shown only now."""
    body = {"name": name, "url": receiver, "event_types": event or _event_types(client)}
    made: Any = client.post(PATH, body=body, cast_to=object)
    err.print(f"signing secret: {made['signing_secret']}")
    out.print(made["id"])


@api_command(app)
def test(client: "OpenAI", endpoint_id: EndpointId) -> None:
    """Send a sample event of a succeeded job now; prints the status that the endpoint answers."""
    body = {"event_type": _event_types(client)[0]}
    result: Any = client.post(f"{PATH}/{endpoint_id}/test", body=body, cast_to=object)
    out.print(result["status_code"])


@api_command(app)
def delete(client: "OpenAI", endpoint_id: EndpointId) -> None:
    """Remove an endpoint; what still waits for it is not sent."""
    client.delete(f"{PATH}/{endpoint_id}", cast_to=object)
    out.print(f"deleted {endpoint_id}")


def _event_types(client: "OpenAI") -> list[str]:
    found: Any = client.get("/webhook_event_types", cast_to=object)
    return list(found["data"])

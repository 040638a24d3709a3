"""The `raydpo webhooks` commands: manage the URLs that the service calls when a job or an evaluation ends."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, err, id_argument, out
from services.cli.lists import list_command

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(
    no_args_is_help=True,
    help="Manage the URLs that the service calls when a job or an evaluation of your project ends.",
)

# The commands name the API's path, because older OpenAI clients have no methods for webhook endpoints.
PATH = "/webhook_endpoints"
EndpointId = Annotated[str, id_argument("Id of the webhook endpoint, which `raydpo webhooks list` shows.")]
Events = Annotated[
    list[str] | None,
    typer.Option(
        "--event",
        help="Type of event that the service posts to the URL, such as fine_tuning.job.failed. Repeatable. Default: "
        "all types.",
    ),
]


def _state(endpoint: dict[str, Any]) -> str:
    return "disabled: answered 410 Gone" if endpoint["x_raydpo"]["disabled_at"] else "enabled"


list_command(
    app,
    PATH,
    "List all webhook endpoints of your project, newest first.",
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
    receiver: Annotated[
        str, typer.Argument(metavar="URL", help="URL to which the service posts events; it begins with https://.")
    ],
    event: Events = None,
    name: Annotated[
        str, typer.Option(help="Name of the new webhook endpoint, which `raydpo webhooks list` shows.")
    ] = "raydpo",
) -> None:
    """Add a webhook endpoint. Prints the endpoint's id, and the secret that signs the endpoint's events. The secret
    cannot be shown again."""
    body = {"name": name, "url": receiver, "event_types": event or _event_types(client)}
    made: Any = client.post(PATH, body=body, cast_to=object)
    err.print(f"signing secret: {made['signing_secret']}")
    out.print(made["id"])


@api_command(app)
def test(client: "OpenAI", endpoint_id: EndpointId) -> None:
    """Post a sample event to a webhook endpoint now, and print the HTTP status of the endpoint's response."""
    body = {"event_type": _event_types(client)[0]}
    result: Any = client.post(f"{PATH}/{endpoint_id}/test", body=body, cast_to=object)
    out.print(result["status_code"])


@api_command(app)
def delete(client: "OpenAI", endpoint_id: EndpointId) -> None:
    """Remove a webhook endpoint. Events that wait to be posted to the endpoint are not sent."""
    client.delete(f"{PATH}/{endpoint_id}", cast_to=object)
    out.print(f"deleted {endpoint_id}")


def _event_types(client: "OpenAI") -> list[str]:
    found: Any = client.get("/webhook_event_types", cast_to=object)
    return list(found["data"])

"""The `raydpo deployments` commands: list, show, set and reset how models are served."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli import yaml_values
from services.cli.client import api_command, fail, id_argument, out
from services.cli.lists import Item, list_command

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(
    no_args_is_help=True,
    help="Show and change how models are served: the number of replicas, the number type (dtype) and so on.",
)

ModelId = Annotated[str, id_argument("Name of a base model or a trained policy.", "MODEL")]


def _state(item: Item) -> str:
    why = item["waits_for"] or item["error"]
    return f"{item['state']}: {why}" if why else str(item["state"])


def _rate(item: Item) -> str:
    return "" if item["tokens_per_second"] is None else f"{item['tokens_per_second']:.1f}"


list_command(
    app,
    "/x/deployments",
    "List how all models are served: state, number of replicas, and generated tokens per second.",
    {"model": "id", "state": _state, "replicas": "replicas_ready", "tokens/s": _rate},
)


@api_command(app)
def show(client: "OpenAI", model_id: ModelId) -> None:
    """Show a model's deployment as JSON: its settings, its state and its load."""
    out.print_json(data=client.get(path_of(model_id), cast_to=object))


@api_command(app, "set")
def change(
    client: "OpenAI",
    model_id: ModelId,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="FIELD=VALUE...",
            help="Settings of how the model is served, such as replicas=2, replicas.max=4 or pinned=true (never "
            "unloaded). VALUE is YAML; null resets the setting to its default.",
        ),
    ],
) -> None:
    """Set how a model is served, and print the deployment as JSON. Settings that are not given keep their values."""
    found: Any = client.get(path_of(model_id), cast_to=object)
    body = dict(found["chosen"])
    for text in values:
        _assign(body, text)
    out.print_json(data=client.put(path_of(model_id), cast_to=object, body=body))


@api_command(app)
def reset(client: "OpenAI", model_id: ModelId) -> None:
    """Reset all settings of a model's deployment to their defaults, and print the deployment as JSON."""
    out.print_json(data=client.delete(path_of(model_id), cast_to=object))


def path_of(model_id: str) -> str:
    return f"/x/deployments/{model_id}"


def _assign(body: dict[str, Any], text: str) -> None:
    """Sets a field of the request body `body` from FIELD=VALUE text.

    `replicas.max=4` sets the field `max` in the field `replicas`. Exits with an error if the text has another form.
    """
    field, found, value = text.partition("=")
    if not found or not field:
        fail(f"{text}: write FIELD=VALUE, such as replicas=2.")
    try:
        parsed = yaml_values.parse(value)
    except ValueError as error:
        fail(f"{text}: {error}; put a value that is a string in quotes.")
    name, _, part = field.partition(".")
    if part:
        whole = body.get(name)
        body[name] = (whole if isinstance(whole, dict) else {}) | {part: parsed}
    elif parsed is None:
        body.pop(name, None)
    else:
        body[name] = parsed

"""The `raydpo feedback` commands: list and delete people's votes on completions, and make training files of the
votes."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, err, id_argument, out
from services.cli.lists import AsJson, Columns, Limit, date, show_list

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(
    no_args_is_help=True, help="List and delete votes on completions, and make training files of the votes."
)


class Kind(StrEnum):
    pairs = "pairs"
    unpaired = "unpaired"
    ratings = "ratings"


class Form(StrEnum):
    messages = "messages"
    text = "text"


COLUMNS: Columns = {
    "id": "id",
    "vote": "vote",
    "kind": "kind",
    "form": "form",
    "models": lambda vote: ",".join(name or "a person" for name in vote["row"]["feedback"]["models"]),
    "created": date("created_at"),
}


@api_command(app, "list")
def list_votes(
    client: "OpenAI",
    kind: Annotated[
        Kind | None, typer.Option(help="Show only votes of this kind. Default: votes of all kinds.")
    ] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List the votes that people gave on completions, newest first."""
    show_list(client, "/x/feedback", COLUMNS, limit, as_json, {"kind": kind} if kind else {})


@api_command(app)
def file(
    client: "OpenAI",
    kind: Annotated[
        Kind,
        typer.Argument(
            help="Kind of the votes: pairs (a better and a worse completion), unpaired (thumbs up or down) or ratings."
        ),
    ],
    form: Annotated[
        Form, typer.Option(help="Take only votes whose prompts are chat messages (`messages`) or plain texts (`text`).")
    ] = Form.messages,
) -> None:
    """Make a training file of all votes of one kind that the project has, and print the file's id."""
    made: Any = client.post("/x/feedback/files", cast_to=object, body={"kind": kind, "form": form})
    err.print(f"{made['filename']}: {made['x_raydpo']['report']['num_rows']} votes")
    out.print(made["id"])


@api_command(app)
def delete(client: "OpenAI", feedback_id: Annotated[str, id_argument("Id of the vote, such as fb-1a2b….")]) -> None:
    """Delete a vote. Training files that were made before still contain the vote."""
    client.delete(f"/x/feedback/{feedback_id}", cast_to=object)
    out.print(f"deleted {feedback_id}")
